"""What `import data` finds when a module of this folder is started as a program: Python then looks for imports here and
not in the folder above. Such a module is a part of train.py and eval.py, and says so."""
import ast
import sys
from pathlib import Path

file = Path(sys.argv[0])
docstring = " ".join(ast.get_docstring(ast.parse(file.read_text())).split())
raise SystemExit(f"data/{file.name} is a part of train.py and eval.py: {docstring.split('. ')[0].rstrip('.')}. "
                 "Nothing is to be run here; try `python train.py --preset quickstart`, or --help")
