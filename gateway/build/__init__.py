"""Offline work on models: rebuilding, quantizing, measuring and proving them; nothing here runs on the request path.

`gateway build MODEL` (`cli`) reads the FP32 model (`source`) and real data (`data`, `images`), makes what the recipes
(`recipes`) can make of it, has each file judged (`gate`) on what it answers and how fast (`measure`, `layers`), and
writes the report (`report`, `plots`) beside the version. `builder` is the story of it. A recipe is added by one row of
`recipes.CATALOGUE`.
"""
