"""Write docs/metrics.md from the table in the package: `python docs/metrics.py`."""

from pathlib import Path

from ramulus.look.glossary import page

if __name__ == "__main__":
    (Path(__file__).parent / "metrics.md").write_text(page(), encoding="utf-8")
