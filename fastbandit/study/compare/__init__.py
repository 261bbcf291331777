"""Found networks against networks of chance: the protocol of a fair comparison.

``config`` has the settings, ``pilot`` and ``power`` say how many networks an arm needs,
``protocol`` freezes what will be done, ``arms`` are the networks of chance, ``stages`` find and
train all networks and then open the test images, ``jobs`` and ``processes`` do the work,
``result`` and ``tables`` say what came out, ``run`` goes from one to the next.
"""
