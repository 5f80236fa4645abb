"""What is written in C: compiled once for this machine, called through ctypes; standard library only."""
