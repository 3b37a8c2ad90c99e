"""`python -m hfsft` is `hfsft`."""

from hfsft.cli import main

if __name__ == "__main__":
    main()
