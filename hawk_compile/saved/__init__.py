"""The compiled prefill of a model in a folder: a new process answers its first prompt without compiling it.

    save.py        `save_compiled`: the graphs of the calls that a model has had, compiled ahead of time
    load.py        `load_compiled`: they are run in the place of what would be compiled
    graph.py       one call captured again, pruned, and described so that it can be run without Dynamo
    calls.py       a call and what it returns, in JSON
    sizes.py       what a graph asks of sizes, in JSON
    served.py      a graph that was loaded: which calls it serves, and how they are run
    unchanged.py   whether a model is what it was when its graphs were loaded
    key.py         what must be equal where graphs are saved and where they are loaded
    manifest.py    what a folder holds

A graph is one of AOTInductor's packages, which takes the weights as inputs, as Dynamo's graphs do: no weight lies in a
folder, none is held twice, and what is done to a weight is seen by the next call. What Dynamo does around a graph is
done here by the manifest: it asks of a call what the graph was captured for, and puts the outputs where they belong.
Whatever is not equal goes on to the compiled prefill, as if nothing had been loaded.
"""
