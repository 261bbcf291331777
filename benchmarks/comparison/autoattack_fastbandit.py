import setting

import fastbandit

model, images, labels = setting.load()
found = fastbandit.evaluate(model, images, labels, epsilon="0.15", progress=False)
print(found.clean, found.robust)
