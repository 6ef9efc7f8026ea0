import torch, numpy as np, sys, time
sys.path.insert(0,'.')
from qexp.calibration.calibrate import calibrate
from qexp.graph import facts
from qexp.recipe import Recipe, apply, resolve
from qexp.passes.fold_bn import fold_bn
from tests.networks import Residual
from qexp.integer.lowering import lower
from qexp.integer.reference import Reference
from qexp.integer.simulate import integer_rounding
torch.manual_seed(0)
uniform={"_target_":"qexp.quantizers.uniform.Uniform","granularity":"tensor","symmetric":False}
w={"_target_":"qexp.quantizers.uniform.Uniform","granularity":"channel","signed":True,"narrow":True}
for bn in ('fold','keep'):
    m=Residual().eval(); x=torch.randn(64,3,8,8)
    st=facts(m,x[:1])
    if bn=='fold':
        fold_bn(m,st); st=facts(m,x[:1])
    plan=resolve(m,st,Recipe(sites={"input":uniform,"weight":w},wbit=4,abit=8))
    apply(m,plan,st); calibrate(m,[x])
    sd={k:v.clone() for k,v in m.state_dict().items()}
    L=lower(m,x[:1])
    for op in L.program.ops: print(op.kind, op.layer, op.inputs, '->', op.output, L.program.tensors[op.output].bits, L.program.tensors[op.output].shape)
    got={}; sim={}
    codes=L.program.encode(x.numpy())
    y=Reference(L.program).run(codes, lambda n,c: got.__setitem__(n,c))
    with torch.no_grad(), integer_rounding(m,L,lambda n,c: sim.__setitem__(n,c)):
        ys=m(x.double())
    for n,c in sim.items(): print(n, (c.numpy()!=got[n]).sum(), c.numel())
    f=m(x); 
    print((f.detach().numpy()-L.program.decode(y)).__abs__().max(), f.abs().max(), (ys.numpy()-L.program.decode(y)).__abs__().max())
    assert all(torch.equal(v,m.state_dict()[k]) and v.dtype==m.state_dict()[k].dtype for k,v in sd.items())
