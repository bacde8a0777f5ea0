"""
The text that fineweb.py tokenizes: local files and folders, or a dataset on the Hugging Face Hub.

A Source is a list of files. pieces() splits them, in order, into Pieces; a worker reads and tokenizes each Piece
independently of the others (a byte order mark at the start of a file is not part of its text):

    .parquet        one row group; FineWeb's have about 1,000 documents
    .jsonl, .json   about 1 MB of lines, each a JSON object with one document
    .txt            about 1 MB of text; the whole file is one document, of any length

.jsonl, .json and .txt files may be compressed (.gz, .zst). Memory use does not depend on the size of the files. A damaged
or truncated file raises BadFile or an error from pyarrow or the UTF-8 decoder; is_damage() separates these from disk and
network errors.
"""
import codecs
import functools
import hashlib
import io
import json
import os
import re
import socket
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

BATCH_ROWS = 16           # documents tokenized in one call: enough to make Python's overhead small
PIECE_BYTES = 8 << 20     # text of the largest row group that is read as one piece; FineWeb's have about 5 MB
BLOCK_BYTES = 1 << 20     # text of a piece of other files
TOKENS_PER_BYTE = 0.2     # of English text, a low estimate: GPT-2's tokens have about 4.5 bytes
HUB_WAITS = (10, 30, 60, 120, 300)  # seconds, in addition to the retries of huggingface_hub itself
CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".parquet", *(kind + codec for kind in (".jsonl", ".json", ".txt") for codec in ("", *CODECS)))


class BadFile(Exception):
    """A file of the source is damaged or truncated."""


def is_damage(error):
    """Whether an exception reports damaged contents of a file, not a failing disk (errno) or network (response)."""
    if isinstance(error, OSError):  # pyarrow's: "Truncated compressed stream", "Corrupt snappy compressed data", ...
        return error.errno is None and not hasattr(error, "response")
    return isinstance(error, (BadFile, pa.ArrowInvalid, UnicodeDecodeError))


# -----------------------------------------------------------------------------
# reading files in pieces

@dataclass(frozen=True)
class Piece:
    """A part of a file that a worker reads and tokenizes."""
    file: int            # index of the file in the source
    number: int          # index of the piece in the file
    read: object         # function that returns an iterable of lists of texts; values other than str are skipped
    begins: bool = True  # False: the piece continues the document of the previous piece


@dataclass(frozen=True)
class Source:
    """Files to read, in order."""
    description: dict    # what manifest.json records
    names: list          # of the files
    sizes: list          # of the files, bytes on disk or on the Hub
    open: object         # function: name -> binary file


def text_bytes(metadata, column, i):
    """Uncompressed size of the column in row group i, in bytes."""
    group = metadata.row_group(i)
    return sum(group.column(c).total_uncompressed_size for c in range(group.num_columns)
               if group.column(c).path_in_schema == column)


def read_footer(open_file, name, column):
    """Metadata of a parquet file; raises ValueError unless it has the column and the column is text."""
    with open_file() as f:
        metadata = pq.ParquetFile(f).metadata
    schema = metadata.schema.to_arrow_schema()
    if schema.names.count(column) > 1:
        raise ValueError(f"{name} has {schema.names.count(column)} columns {column!r}; rename all but one, or choose another"
                         " with --text-column")
    if column not in schema.names:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}: choose one with --text-column")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"column {column!r} of {name} holds {kind}, not text; choose another with --text-column")
    return metadata


def read_row_group(open_file, metadata, i, column):
    """Yields the texts of row group i in lists; holds the compressed column and one list in memory."""
    with open_file() as f:
        file = pq.ParquetFile(f, metadata=metadata, pre_buffer=False,
                              buffer_size=BLOCK_BYTES if text_bytes(metadata, column, i) > PIECE_BYTES else 0)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[i], columns=[column], use_threads=False):
            yield batch.column(column).to_pylist()  # by name: columns=["a.b"] also reads the field b of a struct a


def parquet_pieces(open_file, metadata, column):
    """Yields (function that reads a piece, True) for each row group; a large one is read here and yielded in parts."""
    for i in range(metadata.num_row_groups):
        read = functools.partial(read_row_group, open_file, metadata, i, column)
        if text_bytes(metadata, column, i) <= PIECE_BYTES:
            yield read, True
        else:
            yield from ((lambda texts=texts: [texts], True) for texts in read())


def json_texts(lines, name, first, column):
    """Yields the texts of JSON lines, numbered from first, in one list.

    If a line is not an object, the list ends before it and BadFile is raised. ValueError if the file's first object lacks
    the column.
    """
    texts, checked = [], first > 1
    for number, line in enumerate(lines, first):
        if not line.strip():
            texts.append(None)
            continue
        try:
            row = json.loads(line)
            texts.append(row.get(column))
        except (ValueError, AttributeError, RecursionError) as e:
            yield texts
            raise BadFile(f"line {number} is not a JSON object ({e}); each line must be one") from e
        if not checked and column not in row:
            raise ValueError(f"{name} has no field {column!r}; it has {', '.join(row)}: choose one with --text-column")
        checked = True
    yield texts


def jsonl_pieces(f, name, column):
    """Yields (function that reads a piece, True) for every BLOCK_BYTES of whole lines, also before damage, which is raised."""
    first, error = 1, None
    while error is None:
        lines, size = [], 0
        try:
            while size < BLOCK_BYTES and (line := f.readline()):  # readlines loses those that it has read before an error
                lines.append(line)
                size += len(line)
        except Exception as e:
            if not is_damage(e):
                raise
            error = e
        if lines:
            yield functools.partial(json_texts, lines, name, first, column), True
            first += len(lines)
        elif error is None:
            return
    raise error


def txt_pieces(f):
    """Yields (function that reads a piece, whether it begins the document) for a text file, which is one document.

    The text is cut before a single space between two words. GPT-2's pattern splits there in any case, so the tokens are
    the same as without the cut.
    """
    decoder, text, begins, block = codecs.getincrementaldecoder("utf-8-sig")(), "", True, b"?"
    while block:
        block = f.read(BLOCK_BYTES)
        text += decoder.decode(block, final=not block)
        cut = len(text)
        if block:
            tail = max(0, cut - 4096)  # search the last 4,096 characters; without such a space, read another block
            cut = max((tail + m.start() for m in re.finditer(r"(?<=\S) (?=\S)", text[tail:])), default=0)
        if cut > 0 or not block and begins:
            yield functools.partial(list, [[text[:cut]]]), begins
            text, begins = text[cut:], False


def file_pieces(source, name, column):
    """Yields (function that reads a piece, whether it begins a document) for a file; its suffix selects the format."""
    open_file = functools.partial(source.open, name)
    stem, suffix = os.path.splitext(name)
    if suffix == ".parquet":
        metadata = read_footer(open_file, name, column)
        yield from parquet_pieces(open_file, metadata, column)
        return
    with open_file() as f:
        if suffix in CODECS:
            f, suffix = pa.CompressedInputStream(f, CODECS[suffix]), os.path.splitext(stem)[1]
        f = io.BufferedReader(f)  # the Hub's files and pyarrow's streams have no readline
        yield from txt_pieces(f) if suffix == ".txt" else jsonl_pieces(f, name, column)


def pieces(source, column, bad_files, file=0, number=0):
    """Yields the Pieces of a source in order, starting with piece `number` of file `file`.

    If a file turns out to be damaged, its last Piece raises the error in read(). The rest of a file whose index is in
    bad_files is skipped; the caller adds to this set while it reads.
    """
    for i in range(file, len(source.names)):
        skip, last = number if i == file else 0, -1
        try:
            for last, (read, begins) in enumerate(file_pieces(source, source.names[i], column)):
                if i in bad_files:
                    break
                if last >= skip:
                    yield Piece(i, last, read, begins)
        except Exception as e:
            if not is_damage(e):
                raise

            def read_damaged(error=e):
                raise error
            yield Piece(i, last + 1, read_damaged)


def map_in_order(function, items, workers, ahead):
    """Yields function(item) for every item, in order, computed by threads; an exception in function is raised here.

    At most `ahead` items are read in advance, so memory stays bounded.
    """
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            try:
                waiting.append(pool.submit(function, item))
            except RuntimeError as e:  # "can't start new thread"
                raise ValueError(f"{workers} threads cannot be started ({e}); use a smaller --workers") from e
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# -----------------------------------------------------------------------------
# sources

def find_files(path):
    """Paths of the files below a folder, sorted, without hidden ones; symbolic links are followed.

    Raises OSError for an unreadable folder.
    """
    def stop(error):
        raise error
    files, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]  # .git, .tokens, .ipynb_checkpoints
        if (place := os.path.realpath(folder)) in seen:
            raise ValueError(f"--input {folder} is a link to {place}, which is read already; remove the link")
        seen.add(place)
        # not the manifest of an earlier run, if --out is below the folder
        files += [os.path.join(folder, name) for name in names if name[0] != "." and name != "manifest.json"]
    return sorted(name for name in files if name.endswith(SUFFIXES))


def local_source(paths):
    """The Source of local files and folders; folders are searched recursively, in the order of the file names."""
    names, labels = [], []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no input at {path}; --input takes files ({', '.join(SUFFIXES)}) and folders of them")
        files = find_files(path) if os.path.isdir(path) else [path] * path.endswith(SUFFIXES)
        if not files:
            raise ValueError(f"--input {path}: no file of a supported format ({', '.join(SUFFIXES)})")
        root = path if os.path.isdir(path) else os.path.dirname(path) or "."
        names += files
        labels += [os.path.relpath(name, root).replace(os.sep, "/") for name in files]
    places = set()
    for name in names:
        if not os.path.isfile(name):  # reading a FIFO or a device may never end
            raise ValueError(f"--input {name} is not a regular file, or a broken link; remove it, or copy its contents to"
                             " a file")
        if not os.access(name, os.R_OK):
            raise ValueError(f"--input {name} cannot be read: permission denied")
        if (place := os.path.realpath(name)) in places:
            raise ValueError(f"--input {name} is given twice (as {place}); each file is read once")
        places.add(place)
    sizes = [os.path.getsize(name) for name in names]
    return Source({"files": [list(f) for f in zip(labels, sizes)]}, names, sizes, functools.partial(open, mode="rb"))


def is_unresolved(error):
    """Whether an exception was caused by a host name that DNS does not resolve: there is no network at all."""
    while error and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


def with_retries(function, first=False):
    """function(), retried for about nine minutes while the Hub is unreachable or answers 408, 429 or 5xx.

    first: nothing has been read yet; without a network, the last of three tries is then after 40 seconds.
    """
    from huggingface_hub import logging
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    logging.set_verbosity_error()  # it prints two lines for each of its own five retries
    for wait in (*HUB_WAITS, None):
        try:
            return function()
        except (HTTPError, ConnectionError, LocalEntryNotFoundError) as e:
            response, what = getattr(e, "response", None), " ".join(str(e).split())[:200] or type(e).__name__
            if (wait is None or first and wait > 30 and is_unresolved(e) or isinstance(e, OfflineModeIsEnabled)
                    or response is not None and response.status_code < 500 and response.status_code not in (408, 429)):
                raise ValueError(f"the request to the Hub failed ({what}). Finished shards are kept: run the same command"
                                 " again later, or download the files and use --input") from e
            tqdm.write(f"the request to the Hub failed ({what}); retrying in {wait} s (Ctrl-C stops)")
            time.sleep(wait)


def open_hub_file(path):
    """A binary file on the Hub, whose every request is made with_retries; path is HfFileSystem's."""
    from huggingface_hub import HfFileSystem
    cache = "none" if path.endswith(".parquet") else "readahead"  # parquet: one request per row group
    f = with_retries(lambda: HfFileSystem().open(path, "rb", cache_type=cache))
    request = f.cache.fetcher
    f.cache.fetcher = lambda start, end: with_retries(lambda: request(start, end))
    return f


def hub_source(dataset, name, split, revision, commit=None):
    """The Source of a dataset on the Hub: the files that the datasets library finds for a config and a split.

    commit: what revision referred to when the output folder was created, to resume it. Raises ValueError for a split that
    does not exist and for files of an unsupported format.
    """
    from huggingface_hub import HfApi
    info = with_retries(lambda: HfApi().dataset_info(dataset, revision=commit or revision), first=True)
    commit = commit or info.sha
    import datasets
    datasets.disable_progress_bars()
    builder = with_retries(lambda: datasets.load_dataset_builder(dataset, name, revision=commit))
    found = builder.config.data_files or {}
    if split not in found:
        raise ValueError(f"{dataset} {name} has no split {split!r}; it has {', '.join(map(str, found)) or 'none'}")
    urls = [re.fullmatch(r"hf://datasets/(?P<repo>.+)@(?P<commit>[^/]+)/(?P<path>.+)", url) for url in found[split]]
    if not all(urls):
        raise ValueError(f"{dataset} has files outside of its repository; download them and use --input")
    paths = [url["path"] for url in urls]
    if other := [path for path in paths if not path.endswith(SUFFIXES)]:
        raise ValueError(f"{dataset} has files of an unsupported format ({other[0]}); supported are {', '.join(SUFFIXES)}:"
                         " convert the files to one of these and use --input")
    infos = with_retries(lambda: HfApi().get_paths_info(dataset, paths, revision=commit, repo_type="dataset"))
    sizes = {info.path: info.size for info in infos}
    description = {"dataset": dataset, "name": name, "split": split, "revision": revision, "commit": commit,
                   "files": [[path, sizes[path]] for path in paths]}

    return Source(description, paths, [sizes[path] for path in paths],
                  lambda path: open_hub_file(f"datasets/{dataset}@{commit}/{path}"))


def hub_shards(repo, revision, commit=None):
    """(commit, {name: (size, hash, whether it is in Git LFS)}) of the .bin and .npy shards of a dataset on the Hub, val first.

    hash: that of hub_hash. Shards in subfolders are not counted. Raises ValueError unless there are val and train shards.
    """
    from huggingface_hub import HfApi
    info = with_retries(lambda: HfApi().dataset_info(repo, revision=commit or revision, files_metadata=True), first=True)
    found = {"val": {}, "train": {}}
    for f in sorted(info.siblings, key=lambda f: f.rfilename):
        if match := re.fullmatch(r"[^/]*_(train|val)_\d+\.(npy|bin)", f.rfilename):
            found[match[1]][f.rfilename] = f.size, f.lfs.sha256 if f.lfs else f.blob_id, bool(f.lfs)
    for split, shards in found.items():
        if not shards:
            raise ValueError(f"{repo} has no {split} shards (*_{split}_000001.bin or .npy, not in a subfolder); training needs"
                             " train and val shards. Use --dataset for text")
    return info.sha, found["val"] | found["train"]


def hub_hash(path, is_lfs):
    """The hash of a local file by which the Hub identifies it: sha256 in Git LFS, else that of a git blob."""
    with open(path, "rb") as f:
        if is_lfs:
            return hashlib.file_digest(f, "sha256").hexdigest()
        contents = f.read()  # a few MB at most
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def estimate_tokens(source, column):
    """Estimated number of tokens in a source, from its first files with about a megabyte of text; a low estimate."""
    tokens = size = 0
    for name, file_size in zip(source.names, source.sizes):
        if name.endswith(".parquet"):
            try:
                tokens += estimate_parquet(functools.partial(source.open, name), name, column)
            except Exception as e:
                if not is_damage(e):
                    raise
                continue  # fineweb.make_shards reports the damage
        else:  # text compresses to half its size or less
            tokens += TOKENS_PER_BYTE * file_size * (2 if name.endswith(tuple(CODECS)) else 1)
        size += file_size
        if tokens > TOKENS_PER_BYTE * BLOCK_BYTES:
            break
    return int(tokens / max(1, size) * sum(source.sizes))


def estimate_parquet(open_file, name, column):
    """Estimated number of tokens in a parquet file, from FineWeb's column token_count (GPT-2's tokens) if it has one."""
    metadata, tokens_per_byte = read_footer(open_file, name, column), TOKENS_PER_BYTE
    sizes = [text_bytes(metadata, column, i) for i in range(metadata.num_row_groups)]
    schema = metadata.schema.to_arrow_schema()
    i = schema.get_field_index("token_count")  # -1 also if two columns have this name
    if sizes and i >= 0 and pa.types.is_integer(schema.field(i).type):
        with open_file() as f:
            counts = pq.ParquetFile(f).read_row_group(0, columns=["token_count"])["token_count"].to_pylist()
        total = sum(filter(None, counts))
        # nulls or an absurd number (a token has at least one byte): not FineWeb's
        tokens_per_byte = total / sizes[0] if 0 < total <= sizes[0] else tokens_per_byte
    return tokens_per_byte * sum(sizes)
