"""``python -m kvlearn.glossary`` writes GLOSSARY.md."""

from kvlearn.glossary.page import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
print(f"wrote {PAGE.name}")
