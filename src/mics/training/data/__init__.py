"""Text and conversations become tokens, and tokens batches."""

from mics.training.data.chats import Chats as Chats
from mics.training.data.opening import open_data as open_data
from mics.training.data.prepare import Data as Data
from mics.training.data.prepare import Prompt as Prompt
from mics.training.data.prepare import Sequences as Sequences
from mics.training.data.prepare import prepare_data as prepare_data
from mics.training.data.stream import IGNORED as IGNORED
from mics.training.data.stream import Batch as Batch
from mics.training.data.stream import Stream as Stream
from mics.training.data.tokens import Tokenizer as Tokenizer
