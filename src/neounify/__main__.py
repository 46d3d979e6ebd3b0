"""`python -m neounify` is the command `neounify`."""

from neounify.cli import main

if __name__ == "__main__":
    main()
