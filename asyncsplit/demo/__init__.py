"""`asyncsplit demo`: a small training job on real flights, and what its data plane did.

Read `job` first: it is the whole use of asyncsplit. The rest is its data and how it is shown.
"""

from asyncsplit.demo.command import main as main
