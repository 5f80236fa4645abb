"""The command line, for `python -m ramulus` and `torchrun -m ramulus`."""

from ramulus.cli import main

if __name__ == "__main__":
    main()
