"""Learned optimizers against what people use today: a step, and the unroll that trains them.

A step moves P coordinates by two LSTM layers of 20 units (or by the meta-LSTM over one), without autograd. In
the unroll all variants get the gradients that were recorded, so that none of them differentiates through the
network that is trained, and return theta after every step and the gradient of the LSTM's weights.

Floors are the matrix products at the measured sgemm peak plus one exponential for each sigmoid and tanh, at
the measured rate of exponentials that need no memory; or the bytes over the bandwidth of main memory, where
that is longer. An unroll's floor does each product once forward and twice backward.

Beside the times: the unroll's peak memory, each in a fresh process. `--only memory` selects it.
"""

import math

from bench.common.clock import Plan
from bench.common.run import Family, main
from bench.learned_optimizer.cases import cases
from bench.learned_optimizer.memory import MEMORY

if __name__ == "__main__":
    # No call takes seconds but the first of those that compile, which is no measurement.
    plan = Plan(variant_s=0.6, once_s=math.inf)
    main(Family("learned_optimizer", __doc__, cases, plan, exponentials=True, studies={"memory": MEMORY}))
