"""Checkpoints: sharded, atomic, verified, loadable at any world and partition size."""

from mics.checkpoint.folder import HeldFolder as HeldFolder
from mics.checkpoint.folder import hold_folder as hold_folder
from mics.checkpoint.folder import newest_intact as newest_intact
from mics.checkpoint.folder import prune as prune
from mics.checkpoint.folder import set_aside_newer as set_aside_newer
from mics.checkpoint.folder import step_folder as step_folder
from mics.checkpoint.folder import step_of as step_of
from mics.checkpoint.folder import steps_of as steps_of
from mics.checkpoint.reading import Loaded as Loaded
from mics.checkpoint.reading import load as load
from mics.checkpoint.writing import PendingSave as PendingSave
from mics.checkpoint.writing import save as save
