"""The benchmark experiment: fit January-August, stop on September-October, test November-December (deep: it takes a minute)"""
import os
import numpy as np, pytest

@pytest.mark.skipif(os.environ.get('MLREF_DEEP') != '1', reason='deep: ./run test --deep')
def test_the_served_network_reaches_its_goal():
    from sklearn.metrics import roc_auc_score
    from mlref.contracts import check, rules
    from mlref.core import known_by, minute, rows
    from mlref.events import raw_folder, read_raw, year
    from mlref.features import static
    from mlref.offline import table
    from mlref.train import fit
    st = static(read_raw(raw_folder(), 'airports'), read_raw(raw_folder(), 'planes'))
    t = table(check(year(raw_folder()), rules(list(st.airports))).good, st, 0, 2**40)
    sep, nov = minute('2013-09-01'), minute('2013-11-01')
    stop, test = (rows(t, m & ~np.isnan(t.y)) for m in ((t.T >= sep) & (t.T < nov), t.T >= nov))
    model = fit('torch', known_by(t, sep), stop)
    assert model.trained_until and roc_auc_score(test.y, model.predict(test.X)) >= .765
