"""The commands of `gmsop` besides train, evaluate and predict: each reads its flags and calls the library."""
