"""The glossary and the index of symbols, made from the code and the chapters: ``python -m kvlearn.glossary``.

letters   the letters that docstrings of modules declare, and the public signatures that use them in shapes
terms     words and symbols that no letter is named by
page      GLOSSARY.md, which is also a page of the site
"""
