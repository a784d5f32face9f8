"""The program: training, evaluation, figures, the demo and the command line."""
