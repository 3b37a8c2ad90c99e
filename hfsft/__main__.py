"""`python -m hfsft` is `hfsft`."""

from hfsft.process import install_handlers


def main() -> None:
    """Run the command line; a signal is answered in one line even while its modules load."""
    install_handlers()
    from hfsft.cli import main as run

    run()


if __name__ == "__main__":
    main()
