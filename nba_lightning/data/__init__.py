"""Sources of images, who is poisoned, and the LightningDataModule."""

from nba_lightning.data.datamodule import BackdoorDataModule
from nba_lightning.data.sources import Digits, ImageFolderSource, Source, Torchvision

__all__ = ["BackdoorDataModule", "Digits", "ImageFolderSource", "Source", "Torchvision"]
