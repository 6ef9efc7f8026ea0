import sys,time,torch; sys.path.insert(0,'.')
exec(open('try.py').read().split("for bn in")[0])
from qexp.integer.verify import verify
from qexp.integer.files import save, load
from pathlib import Path
for bn in ('fold','keep'):
    m=Residual().eval(); x=torch.randn(64,3,8,8)
    st=facts(m,x[:1])
    if bn=='fold':
        fold_bn(m,st); st=facts(m,x[:1])
    plan=resolve(m,st,Recipe(sites={"input":uniform,"weight":w},wbit=4,abit=8))
    apply(m,plan,st); calibrate(m,[x])
    L=lower(m,x[:1])
    v=verify(m,L,[(x,None)]); print(v.line()); print(v.frame(L)); print(v.metrics())
    save(L.program,Path('/tmp/prog')); P=load(Path('/tmp/prog'))
    import numpy as np
    assert np.array_equal(Reference(P).run(P.encode(x.numpy())), Reference(L.program).run(P.encode(x.numpy())))
