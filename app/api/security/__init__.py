"""Who may ask for what, and how much; all but ``remote`` decided before a route is reached.

    guard        the ASGI middleware that puts the rules below in order
    proxies      who really asks, when a trusted proxy forwards
    hosts        by which names the service may be called (DNS rebinding)
    origins      which web pages may use it (cross-site requests, CORS)
    rates        how often one client may ask
    bodies       how large a body may be, and how slow
    connection   how many clients there may be, and how long each may take
    remote       pictures that a client names by address
    headers      what every answer carries
    exposure     what the operator is warned of at the start

None of them knows what is drawn.
"""
