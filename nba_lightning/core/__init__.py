"""Pure parts that know no Trainer: maths, features, modes, randomness, checks, metrics."""
