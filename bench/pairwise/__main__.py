"""The pairwise family against what people use today: prototypical, matching and relation losses, distances.

All variants get the same embeddings and have to return the same loss, and with "forward + backward" the same
gradients of support, query and head. 15 queries per class. The libraries work on one episode at a time, as
their users call them, and loop over the tasks.
"""

from bench.common.run import Family, main
from bench.pairwise.cases import cases

if __name__ == "__main__":
    main(Family("pairwise", __doc__, cases))
