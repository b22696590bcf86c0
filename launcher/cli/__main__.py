"""`python -m launcher.cli`: the command, where it is not on the PATH."""

from launcher.cli.verbs import main

if __name__ == "__main__":
    main()
