"""
The text that fineweb.py tokenizes: local files and folders, or a dataset on the Hugging Face Hub.

A Source is a list of files. pieces() splits them, in order, into Pieces, which the worker threads
read and tokenize independently of each other:

    .parquet        one row group; FineWeb's have about 1,000 documents
    .arrow          a few rows; datasets.save_to_disk writes such files
    .jsonl, .json   about 1 MB of JSON objects, each a document: one a line, one array of them, or
                    indented ones
    .txt            about 1 MB of text; documents end at <|endoftext|> or with the file

.jsonl, .json and .txt files may be compressed (.gz, .zst). A byte order mark at the start of a file
is not part of its text. Memory use does not depend on the size of the files. A file that is
damaged, or of an unsupported kind, is a ValueError that names it.
"""
import codecs
import contextlib
import functools
import io
import itertools
import json
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data import END_OF_TEXT
from run.files import check_regular
from run.prepare import not_utf8

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BATCH_ROWS = 16           # documents tokenized in one call: enough to make Python's overhead small
PIECE_BYTES = 8 << 20     # of text in the largest row group read as one piece; FineWeb's have 5 MB
BLOCK_BYTES = 1 << 20     # of text in a piece of other files
TOKENS_PER_BYTE = 0.2     # of English text, a low estimate: GPT-2's tokens have about 4.5 bytes
HUB_WAITS = (10, 30, 60, 120, 300)  # seconds, in addition to the retries of huggingface_hub itself
CODECS = (".gz", ".zst")
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst",
            ".json", ".json.gz", ".json.zst", ".txt", ".txt.gz", ".txt.zst")
# in a folder: hidden files, a manifest of fineweb.py, and metadata of the datasets library
NO_TEXT = re.compile(r"\..*|(manifest|dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow")
# where GPT-2's pattern splits any text: before whitespace that ends a word, and between a letter or
# digit (Latin, Japanese, Chinese, Korean) and a punctuation mark: re's own classes are not quite
# those of the pattern
BORDER = re.compile(r"(?<=\S)[ \t\r\n\u3000]|(?<=[0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"
                    r"\uac00-\ud7a3])[,.;:!?\u3001\u3002\u3008-\u300f\uff01\uff0c\uff1a\uff1b\uff1f]")
# what decoders raise; an OSError of pyarrow has no errno, unlike one of the file system
DAMAGE = (pa.ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError, RecursionError, EOFError,
          OSError, zstd.ZstdError)


@dataclass(frozen=True)
class Source:
    """Files to read, in order."""
    description: dict    # what manifest.json records
    names: list          # of the files
    sizes: list          # of the files, bytes on disk or on the Hub
    open: object         # function: name -> binary file


@dataclass(frozen=True)
class Piece:
    """A part of a file that a worker reads and tokenizes."""
    file: int       # index of the file in the source
    number: int     # index of the piece in the file
    batches: object  # iterable of lists of texts, read while it is iterated; only a str is text
    begins: bool    # False: the piece continues the document of the previous piece


@contextlib.contextmanager
def damage_as_error(name):
    """Context in which a file that pyarrow or a decoder cannot read is a ValueError with name."""
    try:
        yield
    except DAMAGE as e:
        if getattr(e, "errno", None) is not None:
            raise
        reason = " ".join(str(e).split())
        if isinstance(e, UnicodeDecodeError):
            raise not_utf8(name, reason) from e
        if re.search("crypt|LZO", reason):
            raise ValueError(f"{name} is encrypted or compressed by LZO, which pyarrow does not"
                             f" read ({reason}); write it again") from e
        raise ValueError(f"{name} is damaged or truncated ({reason}); copy it again") from e


# -----------------------------------------------------------------------------
# reading files in pieces

def check_column(name, column, columns):
    """ValueError unless the columns of a file, or the fields of its first object, have this one."""
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(columns)}:"
                         " choose one with --text-column")


def check_schema(name, column, schema):
    """ValueError unless an Arrow schema has the column, and it is text."""
    check_column(name, column, schema.names)
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"column {column!r} of {name} holds {kind}, not text;"
                         " choose another with --text-column")


def read_footer(source, name, column):
    """(metadata, uncompressed bytes of the column in each row group) of a parquet file.

    Raises ValueError unless it has the column, and it is text.
    """
    with source.open(name) as f:
        file = pq.ParquetFile(f, buffer_size=BLOCK_BYTES)
        check_schema(name, column, file.metadata.schema.to_arrow_schema())
        # raises an error if the column is encrypted, whose size would abort the process
        next(file.iter_batches(1, columns=[column], use_threads=False), None)
    metadata = file.metadata
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    column_chunks = [metadata.row_group(i).column(paths.index(column))
                     for i in range(metadata.num_row_groups)]
    return metadata, [chunk.total_uncompressed_size for chunk in column_chunks]


def values_of(array):
    """The values of an Arrow array, with None for a string that is not valid UTF-8."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        if len(array) == 1:
            return [None]
        return [value for i in range(len(array)) for value in values_of(array.slice(i, 1))]


def read_row_group(source, name, metadata, i, column, buffer_size):
    """Yields the texts of row group i in lists.

    Holds the compressed column and one list in memory; with a buffer_size, in bytes, not even the
    column.
    """
    with damage_as_error(name), source.open(name) as f:
        file = pq.ParquetFile(f, metadata=metadata, pre_buffer=False, buffer_size=buffer_size)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[i], columns=[column],
                                       use_threads=False):
            # by name: columns=["a.b"] also reads the field b of a struct a
            yield values_of(batch.column(column))


def parquet_pieces(source, name, column):
    """Yields (batches, True) for each row group; a large one is read here and yielded in parts."""
    metadata, sizes = read_footer(source, name, column)
    for i, size in enumerate(sizes):
        if size <= PIECE_BYTES:
            yield read_row_group(source, name, metadata, i, column, 0), True
        else:
            for texts in read_row_group(source, name, metadata, i, column, BLOCK_BYTES):
                yield [texts], True


def arrow_pieces(f, name, column):
    """Yields (batches, True) for every BATCH_ROWS rows of a stream of record batches."""
    reader = pa.ipc.open_stream(f)
    check_schema(name, column, reader.schema)
    for batch in reader:
        for start in range(0, len(batch), BATCH_ROWS):
            yield [values_of(batch.column(column).slice(start, BATCH_ROWS))], True


def parse_rows(rows, name, first, column):
    """Yields one list: the texts of JSON objects, numbered from first; None for an empty line.

    Raises ValueError if a row is not an object, or if the file's first row lacks the column.
    """
    texts = []
    for number, line in enumerate(rows, first):
        with damage_as_error(f"row {number} of {name}"):
            row = json.loads(line) if line.strip() else None
        if row is None:
            texts.append(None)
            continue
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {name} is not a JSON object; a file has one on each"
                             " line, or one array of them")
        if number == 1:
            check_column(name, column, row)
        texts.append(row.get(column))
    yield texts


def json_values(f):
    """Yields the JSON values of a file as text: the elements of an array, or one after another."""
    decode = json.JSONDecoder().raw_decode
    size = 1 << 16  # of a block, which is copied for each value
    f = io.TextIOWrapper(f, "utf-8-sig")
    text = f.read(size).lstrip()
    is_array = text.startswith("[")
    text = text.removeprefix("[").lstrip()
    while not text.startswith("]"):
        try:
            end = decode(text)[1]
        except json.JSONDecodeError:  # the value continues in the next block
            block = f.read(max(size, len(text)))
            if not block:
                if text or is_array:
                    raise
                return
            text += block
        else:
            yield text[:end]
            text = text[end:]
        text = text.lstrip(", \t\r\n")
    if text[1:].strip() or f.read().strip():
        raise json.JSONDecodeError("text follows the array", "", 0)


def json_pieces(f, name, column):
    """Yields (batches, True) for BLOCK_BYTES of JSON lines, or for BATCH_ROWS other JSON values."""
    if re.match(rb"(\xef\xbb\xbf)?\s*(\[|{\s*\n)", f.peek(64)):  # an array, or indented objects
        values = json_values(f)
        blocks = iter(lambda: list(itertools.islice(values, BATCH_ROWS)), [])
    else:
        blocks = iter(lambda: f.readlines(BLOCK_BYTES - 1), [])  # of at least BLOCK_BYTES
    first = 1
    for rows in blocks:
        yield parse_rows(rows, name, first, column), True
        first += len(rows)


def text_blocks(f):
    """Yields the text of a file in blocks that end at a BORDER, where GPT-2's pattern splits too.

    The tokens are thus the same as without the cut.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    for block in iter(lambda: f.read(BLOCK_BYTES), b""):
        text += decoder.decode(block)
        # limitation: a text without any border is one block, for whose encoding tiktoken needs 50
        # times its size
        start = max(0, len(text) - 4096)
        borders = [start + match.start() for match in BORDER.finditer(text[start:])]
        if borders:
            yield text[:borders[-1]]
            text = text[borders[-1]:]
    yield text + decoder.decode(b"", final=True)


def txt_pieces(f):
    """Yields (batches, whether it begins a document) for a text file.

    <|endoftext|> stands between documents, as in the files of TinyStories.
    """
    begins = True
    for text in text_blocks(f):
        first, *others = text.split(END_OF_TEXT)
        if first or not others:  # an empty file is a document too, which is skipped
            yield [[first]], begins
            begins = False
        if others:
            yield [[text for text in others if text]], True
            begins = not others[-1]


def decompress(f, suffix):
    """A compressed file as a stream of its contents."""
    if suffix == ".gz":
        return pa.CompressedInputStream(f, "gzip")
    # pyarrow reads windows of up to 128 MB only
    return zstd.ZstdFile(f, options={zstd.DecompressionParameter.window_log_max: 31})


def file_pieces(source, name, column):
    """Yields (batches, whether it begins a document) for a file; its suffix selects the format."""
    stem, suffix = os.path.splitext(name)
    if suffix == ".parquet":
        yield from parquet_pieces(source, name, column)
        return
    with source.open(name) as f:
        f = io.BufferedReader(f)  # the Hub's files and pyarrow's streams have no readline
        if suffix in CODECS:
            if not f.peek(1):
                raise OSError("it has no bytes")
            f = io.BufferedReader(decompress(f, suffix))
            suffix = os.path.splitext(stem)[1]
        if suffix == ".arrow":
            yield from arrow_pieces(f, name, column)
            return
        if b"\0" in f.peek(4)[:4]:
            raise not_utf8(name, "it has the zero bytes of UTF-16")
        if suffix == ".txt":
            yield from txt_pieces(f)
        else:
            yield from json_pieces(f, name, column)


def pieces(source, column, first_file=0, first_number=0):
    """Yields the Pieces of a source in order, from piece first_number of file first_file on."""
    for i in range(first_file, len(source.names)):
        name = source.names[i]
        with damage_as_error(name):
            for number, (batches, begins) in enumerate(file_pieces(source, name, column)):
                if i > first_file or number >= first_number:
                    yield Piece(i, number, batches, begins)


def check_files(source, column):
    """Reads the first texts of every file; raises the error of one that cannot be read."""
    for i in range(len(source.names)):
        for piece in itertools.islice(pieces(source, column, i), 1):
            next(iter(piece.batches), None)


def map_in_order(function, items, workers, ahead):
    """Yields function(item) for every item, in order, computed by threads; raises its exceptions.

    At most `ahead` items are read in advance, so memory stays bounded.
    """
    pool = ThreadPoolExecutor(workers)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# -----------------------------------------------------------------------------
# local files

def find_files(path):
    """Paths of the files with text below a folder, sorted; links are followed."""
    def stop(error):  # os.walk skips a folder that it cannot list
        raise error

    found = []
    for folder, folders, names in os.walk(path, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]  # .git, .ipynb_checkpoints
        for name in names:
            if name.endswith(SUFFIXES) and not NO_TEXT.fullmatch(name):
                found.append(os.path.join(folder, name))
    return sorted(found)


def local_source(paths):
    """The Source of local files and folders, which are searched recursively."""
    names = []
    places = set()
    description = {"files": []}
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no input at {path}; --input takes files"
                                    f" ({', '.join(SUFFIXES)}) and folders of them")
        if os.path.isdir(path):
            root = path
            found = find_files(path)
        else:
            root = os.path.dirname(path) or "."
            found = [path] if path.endswith(SUFFIXES) else []
        if not found:
            raise ValueError(f"--input {path}: no file of a supported format"
                             f" ({', '.join(SUFFIXES)})")
        for name in found:
            check_regular(name)
            place = os.path.realpath(name)
            if place in places:
                raise ValueError(f"--input {name} is given twice (as {place}); each file is read"
                                 " once")
            places.add(place)
            names.append(name)
            label = os.path.relpath(name, root).replace(os.sep, "/")
            description["files"].append([label, os.path.getsize(name)])
    sizes = [size for _, size in description["files"]]
    return Source(description, names, sizes, functools.partial(open, mode="rb"))


# -----------------------------------------------------------------------------
# the Hub

def with_retries(request, waits=HUB_WAITS):
    """request(), retried after these seconds while the Hub is unreachable or answers 408, 429, 5xx.

    Raises ValueError after the last wait, or at once for another answer, such as 404.
    """
    from huggingface_hub import logging
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    logging.set_verbosity_error()  # it prints two lines for each of its own five retries
    for wait in (*waits, None):
        try:
            return request()
        except (HTTPError, ConnectionError, LocalEntryNotFoundError, json.JSONDecodeError) as e:
            # a timeout has an empty message
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            if isinstance(e, json.JSONDecodeError):
                reason = f"its answer is not JSON, but perhaps a page of a proxy: {reason}"
            response = getattr(e, "response", None)
            is_temporary = (response is None or response.status_code >= 500
                            or response.status_code in (408, 429))
            if wait is None or not is_temporary:
                raise ValueError(f"the request to the Hub failed ({reason}). Finished shards are"
                                 " kept: run the same command again later, or download the files"
                                 " and use --input") from e
            tqdm.write(f"the request to the Hub failed ({reason}); retrying in {wait} s"
                       " (Ctrl-C stops)", file=sys.stderr)
            time.sleep(wait)


def open_hub_file(path):
    """A binary file on the Hub, whose every request is made with_retries; path: HfFileSystem's."""
    from huggingface_hub import HfFileSystem
    # parquet: one request per row group
    cache = "none" if path.endswith(".parquet") else "readahead"
    f = with_retries(lambda: HfFileSystem().open(path, "rb", cache_type=cache))
    fetch = f.cache.fetcher

    def fetch_with_retries(start, end):
        return with_retries(lambda: fetch(start, end))

    f.cache.fetcher = fetch_with_retries
    return f


def hub_source(dataset, name, split, revision, commit=None):
    """The Source of a dataset on the Hub: the files that the datasets library finds for a split.

    name: config of the dataset. commit: what revision referred to in an earlier run, to resume it.
    Raises ValueError for a split that does not exist and for files of an unsupported format.
    """
    from huggingface_hub import HfApi
    # without a network, the first request must not be retried for nine minutes
    info = with_retries(lambda: HfApi().dataset_info(dataset, revision=commit or revision),
                        HUB_WAITS[:2])
    commit = commit or info.sha
    import datasets
    datasets.disable_progress_bars()
    builder = with_retries(lambda: datasets.load_dataset_builder(dataset, name, revision=commit))
    found = builder.config.data_files or {}
    if split not in found:
        raise ValueError(f"{dataset} {name} has no split {split!r};"
                         f" it has {', '.join(map(str, found)) or 'none'}")
    paths = []
    for url in found[split]:
        match = re.fullmatch(r"hf://datasets/.+?@[^/]+/(.+)", url)
        if match is None or not url.endswith(SUFFIXES):
            raise ValueError(f"{dataset} has files of an unsupported format, or outside of its"
                             f" repository ({url}); supported are {', '.join(SUFFIXES)}: convert"
                             " the files to one of these and use --input")
        paths.append(match[1])
    infos = with_retries(lambda: HfApi().get_paths_info(dataset, paths, revision=commit,
                                                        repo_type="dataset"))
    size_of = {info.path: info.size for info in infos}
    sizes = [size_of[path] for path in paths]
    description = {"dataset": dataset, "name": name, "split": split, "revision": revision,
                   "commit": commit, "files": [[path, size] for path, size in zip(paths, sizes)]}

    def open_file(path):
        return open_hub_file(f"datasets/{dataset}@{commit}/{path}")

    return Source(description, paths, sizes, open_file)


# -----------------------------------------------------------------------------
# the number of tokens

def estimate_tokens(source, column):
    """Estimated number of tokens in a source, from its first files with about a megabyte of text.

    A low estimate.
    """
    tokens = 0
    size = 0  # of these files, bytes
    for name, file_size in zip(source.names, source.sizes):
        if name.endswith(".parquet"):
            with damage_as_error(name):
                tokens += estimate_parquet(source, name, column)
        elif name.endswith(CODECS):  # text compresses to half its size or less
            tokens += TOKENS_PER_BYTE * file_size * 2
        else:
            tokens += TOKENS_PER_BYTE * file_size
        size += file_size
        if tokens > TOKENS_PER_BYTE * BLOCK_BYTES:
            break
    return int(tokens / max(1, size) * sum(source.sizes))


def estimate_parquet(source, name, column):
    """Estimated number of tokens in a parquet file.

    If it has FineWeb's column token_count (GPT-2's tokens), its first row group gives the rate.
    """
    metadata, sizes = read_footer(source, name, column)
    tokens_per_byte = TOKENS_PER_BYTE
    if sizes and "token_count" in metadata.schema.to_arrow_schema().names:
        with source.open(name) as f:
            group = pq.ParquetFile(f).read_row_group(0, columns=["token_count"])
        counts = group["token_count"].to_pylist()
        total = sum(count for count in counts if isinstance(count, int))
        if 0 < total <= sizes[0]:  # a token has at least one byte: else they are not GPT-2's
            tokens_per_byte = total / sizes[0]
    return tokens_per_byte * sum(sizes)
