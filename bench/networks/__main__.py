"""`adapt` of networks that the kernels do not know against what people use today, second order.

One call is a meta-step: each of T tasks (5-way 1-shot, 15 queries per class) takes K steps of SGD, and the
mean query loss goes back to the parameters that all start from. Conv4, narrow ResNet-12, GRU, a transformer
layer, MLPs of GELU. The promise is that no row takes more than 1.1 times as long as the best of the others.
"""

from bench.common.clock import Plan
from bench.common.run import Family, main
from bench.networks.cases import cases
from bench.networks.memory import MEMORY

if __name__ == "__main__":
    main(Family("networks", __doc__, cases, Plan(variant_s=0.7, once_s=0.5), studies={"memory": MEMORY}))
