"""The command. Workers of the peers load this file again (as `__mp_main__`), so it imports nothing until it runs."""

if __name__ == "__main__":
    import sys

    from tests.benchmarks.command import main

    main(sys.argv[1:])
