/** One reconciler on the live kernel, and what goes wrong in its rounds: what it keeps, what it tries again, and until when. */
import {mkdirSync, rmdirSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {parsePodsFile, type PodSpec} from '../../src/config/pods-file.js';
import {InputError} from '../../src/errors.js';
import {load} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {openObject} from '../../src/loader/object.js';
import {PinLayout} from '../../src/loader/paths.js';
import {KEPT_SOURCE_MARK, NAMESPACE_RULE4} from '../../src/maps/schema.js';
import {native, type NetNs} from '../../src/native.js';
import {Reconciler, type Round} from '../../src/pods/reconcile.js';
import {eventually, must, run} from '../helpers/process.js';
import {World, type Pod} from '../helpers/world.js';

const BLIND_CHILD = fileURLToPath(new URL('../helpers/blind-child.js', import.meta.url));

type Test = Parameters<typeof World.create>[0];

function arrange(t: Test) {
	const world = World.create(t);
	const opened = openObject();
	opened.object.close();
	const lock = takeWriterLock(new PinLayout(world.bpffs, opened.schema.layoutVersion));
	const {datapath} = load(lock, {cgroup: world.cgroup});
	world.onEnd(() => {
		datapath.close();
		lock.release();
	});
	const agent = (resetOlder = false) => new Reconciler(datapath, {proc: '/proc', resetOlder});
	return {world, datapath, agent, policies: () => new Map(datapath.maps.pods.entries().map(([cookie, {target4}]) => [cookie, target4.port]))};
}

function specsOf(...pods: readonly object[]): Map<string, PodSpec> {
	return new Map(parsePodsFile(JSON.stringify({pods}), 'pods.yaml').map(spec => [spec.name, spec]));
}

const ambient = ({name, netns}: Pod) => ({name, netns, mode: 'ambient'});
const proxied = ({netns}: Pod, name: string, port: number) => ({name, netns, proxy: {port}, exempt: {marks: ['0x1']}});
const hasRule = ({netnsName}: Pod) => must('ip', '-n', netnsName, 'rule').includes('fwmark 0x111/0xfff');
const messages = ({failures}: Round) => [...failures.values()].map(({message}) => message);

/** Until the end of the test, or until it is called: `name` of every namespace fails. */
function breaking(t: Test, name: keyof NetNs, matters: (...args: readonly unknown[]) => boolean = () => true): () => void {
	const open = native.openNetns;
	const mend = () => {
		native.openNetns = open;
	};

	native.openNetns = path => new Proxy(open(path), {
		get(target, key) {
			const value: unknown = Reflect.get(target, key, target);
			return typeof value !== 'function' ? value : (...args: readonly unknown[]) => {
				if (key === name && matters(...args)) {
					throw Object.assign(new Error(`${name}: EROFS: read-only file system`), {code: 'EROFS'});
				}

				return Reflect.apply(value, target, args) as unknown;
			};
		},
	});
	t.teardown(mend);
	return mend;
}

test.serial('two pods in one namespace: both fail and the kernel stays as it is, whichever is looked at, until one of them goes or moves', t => {
	const {world, agent, policies} = arrange(t);
	const pod = world.pod('pod');
	const other = world.pod('other');
	const reconciler = agent();
	const a = proxied(pod, 'a', 15_001);
	const b = proxied(pod, 'b', 16_001);
	t.deepEqual(reconciler.round(specsOf(a), new Set(['a']), true).enrolled, ['a']);
	const before = policies();
	const both = specsOf(a, b);
	for (const due of [['b'], ['a'], ['b'], [], ['a', 'b'], ['a']]) {
		const {enrolled, failures, changes} = reconciler.round(both, new Set(due), due.length === 0);
		t.deepEqual([enrolled, [...failures.keys()].sort(), changes], [[], ['a', 'b'], []], `looked at: ${due.join()}`);
	}

	t.deepEqual(policies(), before);
	// One cannot be looked at for a moment: nobody takes its place.
	const open = native.openNetns;
	const failing = new Map(both).set('b', {...both.get('b')!, findNetns() {
		native.openNetns = path => {
			native.openNetns = open;
			throw Object.assign(new Error(`open(${path}): EMFILE: too many open files`), {code: 'EMFILE'});
		};

		return pod.netns;
	}});
	t.regex(messages(reconciler.round(failing, new Set(['a']), false)).join(), /same network namespace as pod b.*EMFILE/);
	t.deepEqual(policies(), before);

	t.is(reconciler.round(specsOf(a, {...b, netns: other.netns}), new Set(['b']), false).enrolled.length, 2);
	t.deepEqual(reconciler.round(both, new Set(['b']), false).enrolled, []);
	const {enrolled, changes} = reconciler.round(specsOf(b), new Set(['a']), false);
	// The removal is that of the other namespace, which was kept for it.
	t.deepEqual([enrolled, changes], [['b'], ['remove b', 'update b']], 'there is no moment in which nobody is captured');
	t.deepEqual([...policies().values()], [16_001]);
	t.deepEqual(reconciler.round(both, new Set(['a']), false).enrolled, []);
	t.deepEqual(reconciler.round(specsOf({...a, netns: '/run/netns/never-there'}, b), new Set(['a']), false).enrolled, ['b'], 'nor does one that is nowhere hold up the other');
});

test.serial('a pod whose exempt cgroup is gone is still where it was: another in its namespace does not take its place', t => {
	const {world, agent, policies} = arrange(t);
	const pod = world.pod('pod');
	const reconciler = agent();
	const a = {...proxied(pod, 'a', 15_001), exempt: {cgroups: [world.subCgroup('proxy')]}};
	t.deepEqual(messages(reconciler.round(specsOf(a), new Set(['a']), true)), []);
	const before = policies();
	rmdirSync(a.exempt.cgroups[0]!);
	t.regex(messages(reconciler.round(specsOf(a), new Set(['a']), false)).join(), /exempt cgroup/);
	t.deepEqual(reconciler.round(specsOf(a, proxied(pod, 'b', 16_001)), new Set(['b']), false).enrolled, []);
	t.deepEqual(policies(), before);
	mkdirSync(a.exempt.cgroups[0]!);
});

test.serial('a kept pod whose link cannot be made again fails alone', t => {
	const {world, datapath, agent} = arrange(t);
	const [kept, other] = [world.pod('kept'), world.pod('other')];
	t.deepEqual(messages(agent().round(specsOf(ambient(kept)), new Set(['kept']), true)), []);
	const [cookie] = datapath.steeredPods();
	datapath.unsteer(cookie!);
	const specs = specsOf(ambient(kept), ambient(other));
	specs.set('kept', {...specs.get('kept')!, wish: {refused: new InputError('kept', 'not like this')}});
	const steer = datapath.steer.bind(datapath);
	t.teardown(() => {
		datapath.steer = steer;
	});
	datapath.steer = (which, netns) => {
		if (which === cookie) {
			throw new Error('link: ENOSPC');
		}

		steer(which, netns);
	};

	const {enrolled, failures} = agent().round(specs, new Set(['kept', 'other']), true);
	t.deepEqual(enrolled, ['other']);
	t.regex(failures.get('kept')!.message, /stays captured, but for what comes in.*ENOSPC/);
	t.not(datapath.maps.pods.get(cookie!), undefined);
});

test.serial('a pod that is ending and cannot be looked at is a failure, unless it is gone', t => {
	const {world, agent} = arrange(t);
	const pod = world.pod('pod');
	const ending = (findNetns: () => string) => {
		const {netns: _, ...spec} = specsOf(ambient(pod)).get('pod')!;
		return new Map([['pod', {...spec, isEnding: true, findNetns}]]);
	};

	const reconciler = agent();
	t.deepEqual(messages(reconciler.round(ending(() => '/run/netns/never-there'), new Set(['pod']), true)), []);
	t.regex(messages(reconciler.round(ending(() => {
		throw Object.assign(new Error('EMFILE: too many open files'), {code: 'EMFILE'});
	}), new Set(['pod']), false)).join(), /EMFILE/);
});

test.serial('a pod that could be set up only at the second try: its older connections are reset then, once', async t => {
	const {world, agent} = arrange(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`);
	pod.startClients([`${far.ipv4}:8080`], ['--hold']);
	await eventually('it is connected', () => pod.must('ss', '-Htn', 'state', 'established').includes(':8080'));
	const reconciler = agent(true);
	const specs = specsOf(ambient(pod));
	const due = new Set(['pod']);
	const mend = breaking(t, 'setSysctl');
	t.regex(messages(reconciler.round(specs, due, true)).join(), /its namespace could not be set up/);
	mend();
	t.deepEqual(reconciler.round(specs, due, false).changes, ['reset 1 connections of pod that were older than its enrolment']);
	// Exempt, and with the next policy not any more: that is no reason to reset it.
	pod.startClients([`${far.ipv4}:8080`], ['--hold', '--mark', String(0x539)]);
	await eventually('it is connected', () => pod.must('ss', '-Htn', 'state', 'established').includes(':8080'));
	t.deepEqual(reconciler.round(specsOf(proxied(pod, 'pod', 15_001)), due, false).changes, ['update pod', 'restore the namespace settings of pod']);
});

test.serial('a pod that stops keeping sources, and is set up for that only at the second try: its connections with a kept source are reset then', async t => {
	const {world, agent} = arrange(t);
	const pod = world.pod('pod');
	const reconciler = agent();
	const due = new Set(['pod']);
	t.deepEqual(messages(reconciler.round(specsOf(ambient(pod)), due, true)), []);
	await pod.server('[::1]:8080');
	pod.startClients(['[::1]:8080'], ['--hold', '--mark', String(KEPT_SOURCE_MARK)]);
	const connections = () => pod.must('ss', '-Htn', 'state', 'established').split('\n').filter(line => line.includes(':8080')).length;
	await eventually('it is connected', () => connections() === 2);
	const specs = specsOf(proxied(pod, 'pod', 15_001));
	const mend = breaking(t, 'runIterator');
	t.regex(messages(reconciler.round(specs, due, false)).join(), /its namespace could not be set up/);
	mend();
	t.is(connections(), 2);
	t.deepEqual(messages(reconciler.round(specs, due, false)), []);
	t.is(connections(), 0);
});

test.serial('settings that cannot be taken back: the pod is out of capture, and they are tried again when it is looked at, when the maps are read, and by the next agent', t => {
	const {world, datapath, agent} = arrange(t);
	const pod = world.pod('pod');
	const {podInfo, pods} = datapath.maps;
	const first = agent();
	const due = new Set(['pod']);
	const none = new Set<string>();
	const specs = specsOf(ambient(pod));
	t.deepEqual(first.round(specs, due, true).enrolled, ['pod']);
	const [[cookie]] = podInfo.entries() as [[bigint, unknown]];
	const isRule4 = (action: unknown, rule: unknown) => action === 'delete' && (rule as {family: number}).family === 4;
	let mend = breaking(t, 'changeRule', isRule4);
	const removed = first.round(new Map(), due, false);
	t.deepEqual(removed.changes, ['remove pod']);
	t.regex(messages(removed).join(), /it is not captured any more, but settings in its namespace could not be taken back \(ip -4 rule .*EROFS/);
	t.deepEqual([pods.entries(), datapath.maps.addresses.entries(), datapath.maps.counters.keys(), datapath.steeredPods()], [[], [], [], []]);
	t.is(podInfo.get(cookie)!.namespaceChanges, NAMESPACE_RULE4, 'the others are taken back, and nobody is robbed of theirs later');
	t.deepEqual([first.formerOf('pod'), first.modeInKernel('pod')], [undefined, undefined]);
	t.is(messages(first.round(new Map(), none, false)).length, 1, 'others are looked at: it is still said');
	mend();
	first.round(new Map(), none, false);
	t.true(hasRule(pod), 'and not tried each time');
	const again = first.round(new Map(), due, false);
	t.deepEqual([again.changes, messages(again), podInfo.entries(), hasRule(pod)], [['remove pod'], [], [], false]);

	const failing = () => {
		first.round(specs, due, false);
		mend = breaking(t, 'changeRule', isRule4);
		t.is(first.round(new Map(), due, false).failures.size, 1);
		mend();
		t.true(hasRule(pod));
	};

	failing();
	t.deepEqual([messages(first.round(new Map(), none, true)), podInfo.entries(), hasRule(pod)], [[], [], false], 'the maps were read');
	failing();
	t.deepEqual([messages(agent().round(new Map(), none, true)), podInfo.entries(), hasRule(pod)], [[], [], false], 'another agent');
});

test.serial('a pod whose former namespace keeps settings that cannot be taken back is well in its new one; and captured again there, they are its own', t => {
	const {world, datapath, agent} = arrange(t);
	const [old, now] = [world.pod('old'), world.pod('now')];
	const reconciler = agent();
	const due = new Set(['pod']);
	const at = (pod: Pod) => specsOf({...ambient(pod), name: 'pod'});
	reconciler.round(at(old), due, true);
	const mend = breaking(t, 'changeRule', action => action === 'delete');
	const {enrolled, failures, notes} = reconciler.round(at(now), due, false);
	t.deepEqual([enrolled, failures.size], [['pod'], 0]);
	t.regex(notes.join(), /pod pod: it is not captured any more, but settings in its namespace/);
	t.is(reconciler.namespaceOf('pod')!.path, now.netns);
	mend();
	const back = reconciler.round(at(old), due, false);
	t.deepEqual([back.enrolled, back.notes, back.failures.size, hasRule(old), hasRule(now)], [['pod'], [], 0, true, false]);
	t.is(datapath.maps.podInfo.entries().length, 1);
});

test.serial('a change that fails in the middle, and whose undoing fails: the maps are read again, and the pod is whole at the next round', t => {
	const {world, datapath, agent} = arrange(t);
	const pod = world.pod('pod');
	const reconciler = agent();
	const due = new Set(['pod']);
	const {maps} = datapath;
	const breakAll = <K extends 'prefixes' | 'pods'>(name: K, method: 'set' | 'delete') => {
		const map = maps[name] as unknown as Record<'set' | 'delete', () => never>;
		map[method] = () => {
			throw new Error(`${name}.${method}: ENOMEM: not enough memory`);
		};

		return () => {
			delete (map as Partial<typeof map>)[method];
		};
	};

	reconciler.round(specsOf(proxied(pod, 'pod', 15_001)), due, true);
	const wanted = specsOf({...proxied(pod, 'pod', 16_001), exempt: {uids: [7]}});
	// The new lists are written, and the switch fails; then so does taking back the lists.
	const mends = [breakAll('pods', 'set'), breakAll('prefixes', 'delete')];
	const before = maps.prefixes.entries().length;
	const torn = reconciler.round(wanted, due, false);
	t.regex(messages(torn).join(), /changed in part only \(pods\.set: ENOMEM.*and not back \(prefixes\.delete: ENOMEM/);
	t.is([...maps.pods.entries()][0]![1].target4.port, 15_001, 'what was in force still is');
	t.true(maps.prefixes.entries().length > before);
	for (const mend of mends) {
		mend();
	}

	const {enrolled, changes} = reconciler.round(wanted, due, false);
	t.deepEqual(enrolled, ['pod']);
	t.regex(changes.join(), /swept \d+ left-over list entries/);
	t.is(maps.prefixes.entries().length, before);
	t.is([...maps.pods.entries()][0]![1].target4.port, 16_001);
});

test.serial('a round that fails after it has looked: its pods are looked at again before they are said to be enrolled', t => {
	const {world, datapath, agent} = arrange(t);
	const pod = world.pod('pod');
	const specs = specsOf(ambient(pod));
	const reconciler = agent();
	reconciler.round(new Map(), new Set(), true);
	const {steeredPods} = datapath;
	datapath.steeredPods = () => {
		throw new Error('EMFILE: too many open files, scandir');
	};

	t.throws(() => reconciler.round(specs, new Set(['pod']), false), {message: /EMFILE/});
	datapath.steeredPods = steeredPods;
	t.deepEqual(reconciler.round(specs, new Set(), false).enrolled, []);
	t.is(reconciler.namespaceOf('pod'), undefined);
	t.deepEqual(reconciler.round(specs, new Set(['pod']), false).enrolled, ['pod']);
	t.is(datapath.steeredPods().length, 1);
});

test.serial('settings whose making fails in the middle are taken back with the pod', t => {
	const {world, agent} = arrange(t);
	const pod = world.pod('pod');
	const reconciler = agent();
	const due = new Set(['pod']);
	const mend = breaking(t, 'setSysctl');
	t.is(reconciler.round(specsOf(ambient(pod)), due, true).failures.size, 1);
	mend();
	t.true(hasRule(pod));
	t.deepEqual(reconciler.round(new Map(), due, false).changes, ['remove pod']);
	t.false(hasRule(pod));
});

test.serial('no error of looking takes a pod out of capture', t => {
	const {world, datapath, agent} = arrange(t);
	const pod = world.pod('pod');
	const specs = specsOf(ambient(pod));
	const reconciler = agent();
	reconciler.round(specs, new Set(['pod']), true);
	const open = native.openNetns;
	t.teardown(() => {
		native.openNetns = open;
	});
	for (const code of ['ENOMEM', 'EMFILE', 'ENFILE']) {
		native.openNetns = () => {
			throw Object.assign(new Error(`open: ${code}`), {code});
		};

		const {changes, notes} = reconciler.round(specs, new Set(['pod']), code === 'EMFILE');
		t.deepEqual(changes, []);
		t.regex(notes.join(), new RegExp(`cannot be seen whether the namespace of pod pod is still there \\(open: ${code}\\): its capture stays`));
	}

	t.deepEqual([datapath.maps.pods.entries().length, datapath.steeredPods().length], [1, 1]);
});

test.serial('a namespace that has another\'s inode by now is not the other\'s: nothing of it is kept, steered or taken back there', t => {
	const {world, datapath, agent} = arrange(t);
	const pod = world.pod('pod');
	const {maps} = datapath;
	const specs = specsOf(ambient(pod), {name: 'gone', netns: '/run/netns/never-there', mode: 'ambient'});
	const reconciler = agent();
	reconciler.round(specs, new Set(['pod']), true);
	const [[cookie, info]] = maps.podInfo.entries() as [[bigint, NonNullable<ReturnType<typeof maps.podInfo.get>>]];
	const foreign = 99n;
	maps.podInfo.set(foreign, {...info, name: 'gone'});
	maps.pods.set(foreign, maps.pods.get(cookie)!);
	const {changes} = reconciler.round(specs, new Set(['gone']), true);
	t.deepEqual(changes, ['remove gone']);
	t.true(hasRule(pod));
	t.deepEqual(maps.pods.entries().map(([other]) => other), [cookie]);
});

test.serial('an agent that may look at no process keeps pods whose namespaces it does not find', t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const {code, stdout, stderr} = run('unshare', ['--mount', 'setpriv', '--bounding-set', '-sys_ptrace', '--inh-caps', '-all', process.execPath, BLIND_CHILD, world.bpffs, world.cgroup, pod.netns]);
	t.is(code, 0, stderr);
	t.is(stdout, '["pod"] then 1\n');
});
