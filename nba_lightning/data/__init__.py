"""Sources of images, who is poisoned, and the LightningDataModule."""

from nba_lightning.data.datamodule import BackdoorDataModule
from nba_lightning.data.folder import ImageFolderSource
from nba_lightning.data.owner import CleanImages
from nba_lightning.data.sources import Digits, Source
from nba_lightning.data.torchvision_sets import Torchvision

__all__ = ["BackdoorDataModule", "CleanImages", "Digits", "ImageFolderSource", "Source", "Torchvision"]
