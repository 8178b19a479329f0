"""Pages of .html files, one a file; the step `html` turns them into text."""

from collections.abc import Iterator

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import Part, ReadSettings, Tally
from trimaran.runtime.data.readers.streams import open_part


def read_html(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the page that the file is."""
    most = settings.max_document_bytes
    with open_part(part) as stream:
        raw = stream.read(most + 1)
        if len(raw) > most:
            yield Loss(part.place(0), "read.too_large", f"more than {most:,} bytes")
            return
        stream.check(0)
    yield Document(part.place(0), raw=raw, corpus=part.corpus)
