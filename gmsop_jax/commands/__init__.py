"""The commands of `gmsop`: each reads its flags and calls the library."""
