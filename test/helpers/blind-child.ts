/** blind-child BPFFS CGROUP NETNS, in a mount namespace of its own: enrols the pod there, and looks again without any name of it; prints what was enrolled, and how many pods are captured then. */
import {execFileSync} from 'node:child_process';
import {load} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {openObject} from '../../src/loader/object.js';
import {PinLayout} from '../../src/loader/paths.js';
import {parsePodsFile} from '../../src/config/pods-file.js';
import {Reconciler} from '../../src/pods/reconcile.js';

const [bpffs, cgroup, netns] = process.argv.slice(2) as [string, string, string];
const opened = openObject();
opened.object.close();
const lock = takeWriterLock(new PinLayout(bpffs, opened.schema.layoutVersion));
const {datapath} = load(lock, {cgroup});
const reconciler = new Reconciler(datapath, {proc: '/proc', resetOlder: false});
const round = (file: string) => {
	const specs = new Map(parsePodsFile(JSON.stringify({pods: [{name: 'pod', netns: file, mode: 'ambient'}]}), 'pods.yaml').map(spec => [spec.name, spec]));
	return reconciler.round(specs, new Set(['pod']), false);
};

const {enrolled} = round(netns);
execFileSync('mount', ['-t', 'tmpfs', 'none', '/run/netns']);
round(netns);
process.stdout.write(`${JSON.stringify(enrolled)} then ${datapath.maps.pods.entries().length}\n`);
datapath.close();
lock.release();
