"""Raw files -> canonical dataset (schema.py) -> task table (protocols.py, tasktable.py) -> TaskBatch (loader.py)."""
