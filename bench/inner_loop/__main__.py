"""The inner loop against what people use today: adaptation, query loss and the gradient of shared parameters.

One call is a meta-step: every task's network takes K steps of SGD on its support examples, and the mean query
loss goes back to the parameters that all tasks start from. metafast's is `maml_value_and_grad`, as JAX's is
`value_and_grad`; "through autograd" it is `maml_loss` and `torch.autograd.grad`.

Floors count the multiplications and additions of matrix products alone, twice the one or the other. Second
order counts forward-over-reverse Hessian-vector products that reuse the forward pass's activations.

Beside the times: how peak memory grows with steps and tasks, each measured in a fresh process, and the time
per task from 32 to 65,536 tasks, with a figure. `--only memory` and `--only scaling` select these.
"""

from bench.common.clock import Plan
from bench.common.run import Family, main
from bench.inner_loop.cases import cases
from bench.inner_loop.memory import MEMORY
from bench.inner_loop.scaling import scaling

if __name__ == "__main__":
    studies = {"memory": MEMORY, "scaling": scaling}
    main(Family("inner_loop", __doc__, cases, Plan(variant_s=0.7, once_s=0.5), studies=studies))
