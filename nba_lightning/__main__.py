"""``python -m nba_lightning``."""

from nba_lightning.app.cli import main

if __name__ == "__main__":
    main()
