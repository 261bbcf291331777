import setting

import fastbandit

model, images, labels = setting.load()
found = fastbandit.evaluate(
    model, images, labels, epsilon="0.15", preset="quick", limit=None, attacks="pgd-20",
    pgd={"step_size": "0.015"}, checks={"images": 0}, progress=False,
)  # fmt: skip
print(found.clean, found.robust)
