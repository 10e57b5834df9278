"""fluxd: the HTTP service and the command line around fluxcore.

Layers, top to bottom; each may import those below it and fluxcore, never those above:

    app.cli                                       wiring: the command line
    app.main                                      wiring: settings, engine, HTTP app, process
    app.api                                       HTTP: schemas, routes, errors
    app.jobs                                      jobs that outlive the process
    app.engine                                    jobs, the worker thread, image bytes
    app.settings | app.telemetry | app.outbound   foundations; app.errors and app.keys below
"""
