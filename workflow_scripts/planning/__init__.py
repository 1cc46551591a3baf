"""Plans a run before any job starts: it checks the configuration and computes the grid, resources, hashes of code and
figures.

The rules import these modules. The modules import neither torch nor methods, so that planning is quick. The schema
(schema.py) contains all facts about methods that planning needs, and is made from the signatures of the library. The
modules import two parts of kdp_core that have no heavy imports: the tables of families, and the check of folders.

    schema       the JSON schema of the configuration
    messages     ConfigError, and the words of its messages
    variants     the variants of `methods:`: method, options, steps, and what they share with each other
    grid         points, result folders, calibration seeds, ablations
    evaluation   tasks and benchmarks
    resources    sizes of models, memory, devices, shards, and what the planner counts
    config       the check of a configuration
    extents      the sizes that sections ask of models and calibration sets
    refusals     the points that cannot be made, foreseen or found by a job, which a run leaves out
    foreseen     the process that asks the library which points these are
    sources      the form of sources, missing local files, and the folders of local models
    failures     the last line of a run that failed
    code         hashes of the library code that a script runs
    figures      the figures of the report: titles, captions, looks
"""
