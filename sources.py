"""
Where fineweb.py's text comes from: local files and folders, or a dataset on the Hugging Face Hub.

A Source lists files; pieces() cuts them, in order, into Pieces that a worker reads and tokenizes alone:

    .parquet        a row group; FineWeb's have about 1,000 documents
    .jsonl, .json   some whole lines, one document each
    .txt            a stretch of text; the file is one document, of any length
    other formats   rows, as the datasets library gives them

.jsonl and .txt may be compressed (.gz, .zst). Nothing larger than a piece is held. A file that ends too early or is
damaged gives a BadFile, pyarrow's or Unicode's error: is_damage() tells it from a failing disk or network.
"""
import codecs
import functools
import io
import json
import os
import re
import time
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

BATCH_ROWS = 16           # documents tokenized in one call: enough to make Python's part small
PIECE_BYTES = 8 << 20     # text of the largest row group that a worker holds; FineWeb's have about 5 MB
BLOCK_BYTES = 1 << 20     # text of a piece of other files
HUB_WAITS = (10, 30, 60, 120, 300)  # seconds; beyond the retries that huggingface_hub makes by itself
CODECS = {".gz": "gzip", ".zst": "zstd"}
READ_ERRORS = (OSError, pa.ArrowInvalid, UnicodeDecodeError)  # among them: a file cut short or damaged


class BadFile(Exception):
    """A file of the source that cannot be read to its end."""


# -----------------------------------------------------------------------------
# files of text

@dataclass(frozen=True)
class Piece:
    """A part of the source that one worker tokenizes: file and number are its place in it."""
    file: int
    number: int
    read: object         # function: an iterable of lists of texts (None and other things for what is no text)
    begins: bool = True  # False: it goes on with the document of the piece before


@dataclass(frozen=True)
class Source:
    description: dict    # for the manifest
    names: list          # of the files
    sizes: list          # bytes, on disk or on the Hub
    open: object         # function: name -> binary file
    rows: object = None  # instead, for formats only the datasets library reads: function of the column -> lists of texts
    retry: object = staticmethod(lambda function: function())  # calls what reads, again when the network failed


def text_column(schema, column, name):
    """Checks that a parquet file has a column of text."""
    if column not in schema.names:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}: choose by --text-column")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"column {column!r} of {name} holds {kind}, not text; choose another by --text-column")


def text_bytes(metadata, column, i):
    """Bytes that the text of row group i takes, uncompressed."""
    group = metadata.row_group(i)
    return sum(group.column(c).total_uncompressed_size for c in range(group.num_columns)
               if group.column(c).path_in_schema == column)


def read_row_group(open_file, metadata, i, column):
    """Yields the texts of row group i in lists; holds little more than the compressed column and one list."""
    with open_file() as f:
        file = pq.ParquetFile(f, metadata=metadata, pre_buffer=False,
                              buffer_size=BLOCK_BYTES if text_bytes(metadata, column, i) > PIECE_BYTES else 0)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[i], columns=[column], use_threads=False):
            yield batch.column(0).to_pylist()


def read_footer(open_file, name, column):
    """Metadata of a parquet file, after a check that it has a column of text."""
    with open_file() as f:
        file = pq.ParquetFile(f)
        text_column(file.schema_arrow, column, name)
        return file.metadata


def parquet_pieces(open_file, metadata, column):
    """(function that reads a piece, True) for every row group; a large one comes in small pieces, read here."""
    for i in range(metadata.num_row_groups):
        read = functools.partial(read_row_group, open_file, metadata, i, column)
        if text_bytes(metadata, column, i) <= PIECE_BYTES:
            yield read, True
        else:
            yield from ((lambda texts=texts: [texts], True) for texts in read())


def json_texts(lines, name, first, column):
    """[texts] of JSON lines; first is the number of the first one. Raises BadFile for what is not JSON."""
    texts = []
    for number, line in enumerate(lines, first):
        try:
            row = json.loads(line) if line.strip() else {column: None}
            texts.append(row.get(column))
        except (ValueError, AttributeError) as e:
            raise BadFile(f"line {number} is not a JSON object ({e})") from e
        if number == 1 and column not in row:
            raise ValueError(f"{name} has no field {column!r}; it has {', '.join(row)}: choose by --text-column")
    return [texts]


def jsonl_pieces(f, name, column):
    """(function that reads a piece, True) for every BLOCK_BYTES of whole lines."""
    first = 1
    while lines := f.readlines(BLOCK_BYTES):
        yield functools.partial(json_texts, lines, name, first, column), True
        first += len(lines)


def txt_pieces(f):
    """(function that reads a piece, whether it begins the document): a text file is one document, of any length.

    It is cut before single spaces between words, where GPT-2's pattern always cuts: the tokens are those of the whole.
    """
    decoder, text, begins, block = codecs.getincrementaldecoder("utf-8")(), "", True, b"?"
    while block:
        block = f.read(BLOCK_BYTES)
        text += decoder.decode(block, final=not block)
        cut = len(text)
        if block:
            tail = max(0, cut - 4096)  # a window; where it has no such space, the piece grows by a block
            cut = max((tail + m.start() for m in re.finditer(r"(?<=\S) (?=\S)", text[tail:])), default=0)
        if cut > 0 or not block and begins:
            yield functools.partial(list, [[text[:cut]]]), begins
            text, begins = text[cut:], False


def pieces(source, column, bad_files, file=0, number=0):
    """Yields the Pieces of a source from a place on, in order. A file that cannot be read gives one Piece that raises
    BadFile; one that is in bad_files ({index: error}, which may grow meanwhile) is not read on."""
    for i in range(file, len(source.names)):
        skip, last = number if i == file else 0, -1
        try:
            for last, (read, begins) in enumerate(file_pieces(source, i, column)):
                if i in bad_files:
                    break
                if last >= skip:
                    yield Piece(i, last, read, begins)
        except READ_ERRORS as e:
            if not is_damage(e):
                raise
            yield Piece(i, last + 1, functools.partial(raise_error, e))


def file_pieces(source, i, column):
    """(function that reads a piece, whether it begins a document) for all of file i, by the suffix of its name."""
    name = source.names[i]
    if source.rows:
        yield from ((functools.partial(list, [texts]), True) for texts in source.rows(column))
        return
    open_file = functools.partial(source.open, name)
    stem, suffix = os.path.splitext(name)
    if suffix == ".parquet":
        metadata = source.retry(functools.partial(read_footer, open_file, name, column))
        yield from parquet_pieces(open_file, metadata, column)
        return
    with open_file() as f:
        if suffix in CODECS:
            f, suffix = io.BufferedReader(pa.CompressedInputStream(f, CODECS[suffix])), os.path.splitext(stem)[1]
        yield from txt_pieces(f) if suffix == ".txt" else jsonl_pieces(f, name, column)


def is_damage(error):
    """Whether an error in reading speaks of the file's contents, not of the disk (errno) or the network (response)."""
    if isinstance(error, OSError):  # pyarrow's: "Truncated compressed stream", "Corrupt snappy compressed data", ...
        return error.errno is None and not hasattr(error, "response")
    return isinstance(error, (BadFile, pa.ArrowInvalid, UnicodeDecodeError))


def raise_error(error):
    """raise, as an expression."""
    raise error


# -----------------------------------------------------------------------------
# sources

def local_source(paths):
    """The Source of files and folders (searched through, in the order of their names); FileNotFoundError if none is there."""
    suffixes = tuple(kind + codec for kind in (".jsonl", ".json", ".txt") for codec in ("", *CODECS)) + (".parquet",)
    names, labels = [], []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no input at {path}; --input takes files ({', '.join(suffixes)}) and folders of them")
        inside = sorted(os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files
                        if name.endswith(suffixes) and not name.startswith("."))
        if os.path.isfile(path) and not path.endswith(suffixes) or os.path.isdir(path) and not inside:
            raise ValueError(f"--input {path}: nothing there is called *{', *'.join(suffixes)}")
        root = path if os.path.isdir(path) else os.path.dirname(path)
        names += inside or [path]
        labels += [os.path.relpath(name, root or ".").replace(os.sep, "/") for name in inside or [path]]
    sizes = [os.path.getsize(name) for name in names]
    return Source({"files": [list(f) for f in zip(labels, sizes)]}, names, sizes, functools.partial(open, mode="rb"))


def patiently(function):
    """function(), tried again and again for about nine minutes while the Hub does not answer, refuses (429) or fails."""
    import httpx2
    for wait in (*HUB_WAITS, None):
        try:
            return function()
        except (httpx2.HTTPError, ConnectionError) as e:
            response = getattr(e, "response", None)
            if wait is None or response is not None and response.status_code < 500 and response.status_code not in (408, 429):
                what = " ".join(str(e).split())[:200] or type(e).__name__
                raise ValueError(f"the Hub does not give what was asked for ({what}). Finished shards are kept: run the"
                                 " same command again later, or copy the files here and name them with --input") from e
            tqdm.write(f"the Hub: {type(e).__name__} {str(e).splitlines()[0][:120]}; trying again in {wait} s (Ctrl-C stops;"
                       " --input takes local copies)")
            time.sleep(wait)


def hub_source(dataset, name, split, revision, commit=None):
    """The Source of a dataset on the Hub, found by the datasets library: its files, or its rows if they are of a kind
    that only that library reads. commit: what revision stood for when the work began."""
    import datasets
    from huggingface_hub import HfApi, HfFileSystem
    datasets.disable_progress_bars()
    builder = patiently(lambda: datasets.load_dataset_builder(dataset, name, revision=commit or revision))
    found = builder.config.data_files or {}
    if split not in found:
        raise ValueError(f"{dataset} {name} has no split {split!r}; it has {', '.join(map(str, found)) or 'none'}")
    urls = [re.fullmatch(r"hf://datasets/(?P<repo>.+)@(?P<commit>[^/]+)/(?P<path>.+)", url) for url in found[split]]
    commit, paths = urls[0]["commit"], [url["path"] for url in urls]
    infos = patiently(lambda: HfApi().get_paths_info(dataset, paths, revision=commit, repo_type="dataset"))
    size_of = {info.path: info.size for info in infos}
    sizes = [size_of[path] for path in paths]
    description = {"dataset": dataset, "name": name, "split": split, "revision": revision, "commit": commit,
                   "files": [list(f) for f in zip(paths, sizes)]}
    if not all(re.search(r"\.(parquet|(jsonl|txt)(\.gz|\.zst)?)$", path) for path in paths):
        def rows(column):
            stream = builder.as_streaming_dataset(split=split)
            for batch in stream.iter(BATCH_ROWS):
                if column not in batch:
                    raise ValueError(f"{dataset} has no column {column!r}; it has {', '.join(batch)}: --text-column")
                yield batch[column]
        return Source(description, [dataset], [sum(sizes)], None, rows, patiently)

    def open_file(path):
        # a whole row group in one request; of other files, blocks in order
        cache = "none" if path.endswith(".parquet") else "readahead"
        return HfFileSystem().open(f"datasets/{dataset}@{commit}/{path}", "rb", cache_type=cache)
    return Source(description, paths, sizes, open_file, None, patiently)


def estimate_tokens(source, column):
    """About how many tokens a source has, rather fewer than more: from the first file, where the format tells."""
    name, tokens_per_byte = source.names[0], 0.2  # of English text, about 4.5 bytes a token
    if name.endswith(".parquet"):
        open_file = functools.partial(source.open, name)
        try:
            metadata = source.retry(functools.partial(read_footer, open_file, name, column))
            counts = source.retry(functools.partial(token_counts, open_file)) if metadata.num_row_groups else None
        except READ_ERRORS as e:
            if not is_damage(e):
                raise
            return 0  # the reading proper will say what is wrong with it
        sizes = [text_bytes(metadata, column, i) for i in range(metadata.num_row_groups)]
        per_byte = counts / sizes[0] if counts else tokens_per_byte
        tokens_per_byte = per_byte * sum(sizes) / source.sizes[0]
    elif name.endswith(tuple(CODECS)):
        tokens_per_byte *= 2  # compressed to half, or less
    return int(tokens_per_byte * sum(source.sizes))


def token_counts(open_file):
    """Sum of FineWeb's column token_count (by GPT-2's tokenizer) in the first row group, or None if there is none."""
    with open_file() as f:
        file = pq.ParquetFile(f)
        if "token_count" in file.schema_arrow.names:
            return int(file.read_row_group(0, columns=["token_count"])["token_count"].to_numpy().sum())
