"""Makes the networks known to gin: ``import models.configurables`` in a config, then ``@resnet50``.

Kept apart from the networks themselves, which need nothing but Keras.
"""

import gin

from models import MODELS

for _factory in MODELS.values():
    gin.register(_factory, denylist=["num_classes"])  # the data says how many there are
