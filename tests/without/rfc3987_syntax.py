"""Hides the package of this name, which takes more than a second of every process that imports jsonschema.

It builds a grammar of internationalized web addresses, for a format that no notebook has. jsonschema can do without it.
``tasks.py`` puts this folder first on the path: a plugin of pytest imports jsonschema before any ``conftest.py``.
"""

raise ImportError("not needed by the tests")
