"""``python -m moesaic`` is the ``moesaic`` command."""

from moesaic.cli import main

if __name__ == "__main__":
    main()
