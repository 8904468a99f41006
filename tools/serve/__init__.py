"""An OpenAI-compatible server: requests of many clients are decoded side by side, a step for all of them at a time.

`slots` holds the texts in rows of one cache, `scheduler` decides which rows a step moves, `protocol` reads requests and
writes answers as the OpenAI API has them, `app` is the HTTP side.
"""
