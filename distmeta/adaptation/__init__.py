"""The inner loop of gradient-based meta-learning, exact and for many tasks at once. Pure torch; knows no method.

maps.py      Linear and Table: the linear maps that can be adapted
lookup.py    rows taken by index, from tables and from unique items
features.py  rows of features before they are expanded: per task, gathered from unique items, or dense
overlap.py   inner products of weighted bags of indices (a table's Gram matrix)
fast.py      fast weights of a block of tasks: dual pairs or private weights, map by map
cost.py      which of the two forms a layer gets
chain.py     ReLU and dense layer in turn, as two autograd nodes with a reverse pass written out
products.py  batched products and steps whose gradients are written out
tape.py      a forward pass that can write its own δ in differentiable operations
norm.py      the squared norm of each task's gradient
inner.py     the loop: steps, order, rates
"""
