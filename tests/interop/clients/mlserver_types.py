"""Reads a daemon's answers into MLServer's pydantic types; stdin is {TYPE: answer}.

python mlserver_types.py < answers.json
"""

import json
import sys

from mlserver import types

answers = json.load(sys.stdin)
for name, answer in answers.items():
    getattr(types, name.split()[0]).model_validate(answer)
print(json.dumps(sorted(answers)))
