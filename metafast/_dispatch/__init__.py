"""What carries an op from Python to its kernels: compiled module, doors, fakes, chains, argument checks."""
