"""`adapt` of networks that are no MLPs against what people use today, second order.

One call is a meta-step: each of T tasks (5-way 1-shot, 15 queries per class) takes K steps of SGD, and the
mean query loss goes back to the parameters that all start from. Conv4, which the kernels know, and narrow
ResNet-12, GRU, a transformer layer, MLPs of GELU, which they do not. A fused row is to be twice as fast as
the best of loop, torch.func and the libraries and five times as fast as torch.func, and to take at most 1.5
times the floor; no other takes more than 1.1 times as long as that best. The floor is of the FMA peak of the
threads, which no sgemm here reaches.

With a GPU the 5-shot meta-step of a Conv4-64 comes first, in float32, TF32 and bfloat16: see five_shot.py.
`--only 5-shot` measures it alone, with JAX, which takes a minute to compile, where `--seconds` leaves it one.
"""

from bench.common.clock import Plan
from bench.common.run import Family, main
from bench.networks import five_shot
from bench.networks.cases import cases
from bench.networks.memory import MEMORY

if __name__ == "__main__":
    plan = Plan(variant_s=0.7, once_s=0.5)
    studies = {"memory": MEMORY}
    main(Family("networks", __doc__, cases, plan, fma=True, weight=five_shot.weight, studies=studies))
