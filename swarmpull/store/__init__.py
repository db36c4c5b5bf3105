"""Everything on the local disk: the content-addressed cache, partial blobs, uploads, and backends.

`blobs` is the way in: `open_store` gives a `BlobStore` with its partial blobs (`partials`) and upload
sessions (`uploads`).  Below them: `content` is the tree of complete blobs, `spool` a file that is
hashed as it grows, `sidecars` the file form of metainfo, `hashing` and `scanning` the hashes, `disk`
the threads and the translation of errors, `durable` what survives a crash.  `backends` stands alone.

What may stay is decided in `eviction`, from what `ledger` has in its books (each growing file through its
`room`) and what `holds` pins; `janitor` carries it out.  `offline` is for those who only visit.
"""
