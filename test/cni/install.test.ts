import {execFile} from 'node:child_process';
import {chmodSync, existsSync, lstatSync, mkdirSync, readFileSync, readdirSync, renameSync, rmSync, statSync, symlinkSync, unlinkSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import {promisify} from 'node:util';
import test, {type ExecutionContext} from 'ava';
import {CniInstaller, CNI_VERSIONS, PLUGIN_NAME} from '../../src/cni/install.js';
import {HostError, InputError} from '../../src/errors.js';
import {eventually} from '../helpers/process.js';
import {directory} from './plugin.js';

const CHAIN = {
	name: 'k8s-pod-network', cniVersion: '0.3.1', disableCheck: true,
	plugins: [{type: 'calico', mtu: 0, policy: {type: 'k8s'}, log_level: 'info', ratio: 0.25, nodename: 'n\u00e9'}, {type: 'portmap', snat: true, capabilities: {portMappings: true}}],
};
const ENTRY = {type: PLUGIN_NAME, socket: '/var/run/sidestep/cni.sock', timeoutSeconds: 60};
const CHAINED = {...CHAIN, plugins: [...CHAIN.plugins, ENTRY]};

class Host {
	readonly base: string;
	readonly lines: string[] = [];
	readonly installer: CniInstaller;

	constructor(t: ExecutionContext, readonly options: {readonly socketPath?: string; readonly checkMs?: number} = {}) {
		this.base = directory(t);
		mkdirSync(this.conf());
		writeFileSync(path.join(this.base, 'built'), '#!/bin/sh\necho first\n');
		this.installer = this.another();
		t.teardown(() => {
			this.installer.close();
		});
	}

	/** As the next agent would be. */
	another(options: {readonly socketPath?: string; readonly timeoutSeconds?: number} = {}): CniInstaller {
		return new CniInstaller({
			binary: path.join(this.base, 'built'), binDir: this.bin(), confDir: this.conf(), socketPath: ENTRY.socket, timeoutSeconds: 60, log: line => this.lines.push(line), ...this.options, ...options,
		});
	}

	conf(...names: string[]): string {
		return path.join(this.base, 'net.d', ...names);
	}

	bin(...names: string[]): string {
		return path.join(this.base, 'bin', ...names);
	}

	write(name: string, value: unknown): void {
		writeFileSync(this.conf(name), typeof value === 'string' ? value : JSON.stringify(value));
	}

	read(name: string): unknown {
		return JSON.parse(readFileSync(this.conf(name), 'utf8'));
	}

	names(): string[] {
		return readdirSync(this.conf()).sort();
	}
}

test('file and entry are put in place; all else in the chain stays, in its order', t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	chmodSync(host.conf('10-calico.conflist'), 0o600);
	t.false(host.installer.state.installed);
	host.installer.install();
	t.deepEqual(host.installer.state, {installed: true});
	t.is(readFileSync(host.conf('10-calico.conflist'), 'utf8'), `${JSON.stringify(CHAINED, undefined, 2)}\n`);
	t.is(statSync(host.conf('10-calico.conflist')).mode & 0o777, 0o600);
	t.is(readFileSync(host.bin(PLUGIN_NAME), 'utf8'), '#!/bin/sh\necho first\n');
	t.is(statSync(host.bin(PLUGIN_NAME)).mode & 0o777, 0o755);
	t.deepEqual(host.names(), ['10-calico.conflist'], 'nothing is left behind');
	t.deepEqual(readdirSync(host.bin()), [PLUGIN_NAME]);
});

test('what is right is not touched', t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	host.installer.install();
	const identity = () => [host.conf('10-calico.conflist'), host.bin(PLUGIN_NAME)].map(file => [statSync(file).ino, statSync(file).mtimeMs, statSync(file).ctimeMs]);
	const before = identity();
	host.installer.install();
	host.another().install();
	t.deepEqual(identity(), before);
	t.is(host.lines.length, 2);
	// Somebody else's plugin behind ours is no reason to change places again and again.
	host.write('10-calico.conflist', {...CHAIN, plugins: [...CHAINED.plugins, {type: 'istio-cni'}]});
	const rewritten = identity();
	host.installer.install();
	t.deepEqual(identity(), rewritten);
	t.deepEqual(host.read('10-calico.conflist'), {...CHAIN, plugins: [...CHAINED.plugins, {type: 'istio-cni'}]});
});

test('the entry follows the options, where it is; two of ours become one', t => {
	const host = new Host(t);
	const [first, second] = CHAIN.plugins;
	host.write('10-calico.conflist', {...CHAIN, plugins: [first, ENTRY, second]});
	host.another({socketPath: '/run/other.sock', timeoutSeconds: 30}).install();
	const other = {...ENTRY, socket: '/run/other.sock', timeoutSeconds: 30};
	t.deepEqual(host.read('10-calico.conflist'), {...CHAIN, plugins: [first, other, second]});
	host.write('10-calico.conflist', {...CHAIN, plugins: [ENTRY, first, ENTRY, second]});
	host.installer.install();
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
});

test('a new build replaces the file, also while the old one runs', async t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	writeFileSync(path.join(host.base, 'built'), readFileSync('/bin/sleep'));
	host.installer.install();
	const running = promisify(execFile)(host.bin(PLUGIN_NAME), ['1']);
	writeFileSync(path.join(host.base, 'built'), '#!/bin/sh\necho second\n');
	host.installer.install();
	t.is((await promisify(execFile)(host.bin(PLUGIN_NAME))).stdout, 'second\n');
	await running;
	chmodSync(host.bin(PLUGIN_NAME), 0o600);
	host.installer.install();
	t.is(statSync(host.bin(PLUGIN_NAME)).mode & 0o777, 0o755);
	writeFileSync(host.bin(PLUGIN_NAME), 'another program of that name');
	host.installer.install();
	t.is((await promisify(execFile)(host.bin(PLUGIN_NAME))).stdout, 'second\n');
});

test('the network that pods get is the first by bytes of those that the runtimes read', t => {
	const host = new Host(t);
	for (const name of ['00-first.conflist.bak', '00-note.txt', '05-old.conflist.sidestep-new', 'a.conflist', 'Z.conflist', '20-b.conflist', '100-c.conflist']) {
		host.write(name, CHAIN);
	}

	mkdirSync(host.conf('00-directory.conflist'));
	host.installer.install();
	for (const name of host.names().filter(name => name !== '00-directory.conflist')) {
		t.deepEqual(host.read(name), name === '100-c.conflist' ? CHAINED : CHAIN, name);
	}
});

test('no network yet: not installed, and says so; in place as soon as there is one', async t => {
	const host = new Host(t);
	t.throws(() => {
		host.installer.install();
	}, {instanceOf: HostError, message: /there is no CNI network in .*net\.d yet/});
	host.installer.watch();
	t.false(host.installer.state.installed);
	t.regex(host.installer.state.problem!, /no CNI network/);
	t.true(existsSync(host.bin(PLUGIN_NAME)), 'CRI-O takes no chain that names a plugin which is not there');
	host.write('10-calico.conflist', CHAIN);
	await eventually('installed', () => host.installer.state.installed);
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
	t.is(host.installer.state.problem, undefined);
});

test('also when the directory itself comes later', async t => {
	const host = new Host(t, {checkMs: 50});
	rmSync(host.conf(), {recursive: true});
	host.installer.watch();
	t.false(host.installer.state.installed);
	mkdirSync(host.conf());
	host.write('10-calico.conflist', CHAIN);
	await eventually('installed', () => host.installer.state.installed);
	rmSync(host.conf(), {recursive: true});
	await eventually('noticed', () => !host.installer.state.installed);
	mkdirSync(host.conf());
	host.write('10-calico.conflist', CHAIN);
	await eventually('installed again', () => host.installer.state.installed);
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
});

test('put back: the chain rewritten, a new first network, the file removed', async t => {
	// Nothing but what is heard: the check would come too late.
	const host = new Host(t, {checkMs: 3_600_000});
	host.write('10-calico.conflist', CHAIN);
	host.installer.watch();
	t.true(host.installer.state.installed);
	const chained = (name: string) => () => readFileSync(host.conf(name), 'utf8') === `${JSON.stringify(CHAINED, undefined, 2)}\n`;
	host.write('10-calico.conflist', CHAIN);
	await eventually('put back', chained('10-calico.conflist'));
	// By rename, as careful programs do.
	host.write('new', CHAIN);
	renameSync(host.conf('new'), host.conf('10-calico.conflist'));
	await eventually('put back again', chained('10-calico.conflist'));
	host.write('05-cilium.conflist', CHAIN);
	await eventually('put into the new one', chained('05-cilium.conflist'));
	// Nothing else is to wake it.
	await sleep(500);
	unlinkSync(host.bin(PLUGIN_NAME));
	await eventually('the file', () => existsSync(host.bin(PLUGIN_NAME)));
	unlinkSync(host.conf('05-cilium.conflist'));
	t.true(chained('10-calico.conflist')(), 'the one of before still has it');
});

test('a change that fails again and again is told with its own reason, and is nobody else\'s doing', t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	const inTheWay = host.conf('10-calico.conflist.sidestep-new');
	mkdirSync(inTheWay);
	for (let i = 0; i < 20; i++) {
		t.throws(() => {
			host.installer.install();
		}, {instanceOf: HostError, message: /the CNI plugin cannot be installed/});
		t.notRegex(host.installer.state.problem!, /another program/);
	}

	rmSync(inTheWay, {recursive: true});
	host.installer.install();
	t.deepEqual(host.installer.state, {installed: true});
});

test('a .conf beside another program\'s list of that name: neither is touched', t => {
	const host = new Host(t);
	const single = {cniVersion: '1.0.0', name: 'single', type: 'bridge'};
	host.write('10-net.conf', single);
	host.write('10-net.conflist', CHAIN);
	for (let i = 0; i < 20; i++) {
		t.throws(() => {
			host.installer.install();
		}, {instanceOf: HostError, message: /10-net\.conf cannot be made a list \(.*10-net\.conflist is there, and another program's\): remove/});
	}

	t.deepEqual([host.read('10-net.conf'), host.read('10-net.conflist'), host.names()], [single, CHAIN, ['10-net.conf', '10-net.conflist']]);
	unlinkSync(host.conf('10-net.conf'));
	host.installer.install();
	t.deepEqual(host.read('10-net.conflist'), CHAINED);
});

test('a network that is written slowly is taken when it is whole', async t => {
	const host = new Host(t, {checkMs: 3_600_000});
	const text = JSON.stringify(CHAIN);
	host.write('10-calico.conflist', text.slice(0, 40));
	host.installer.watch();
	t.regex(host.installer.state.problem!, /is not JSON/);
	t.is(readFileSync(host.conf('10-calico.conflist'), 'utf8'), text.slice(0, 40));
	host.write('10-calico.conflist', text);
	await eventually('installed', () => host.installer.state.installed);
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
});

test('two that undo each other\'s work: it slows down, says so, and goes on', async t => {
	const host = new Host(t, {checkMs: 20});
	host.write('10-calico.conflist', CHAIN);
	host.installer.watch();
	let undone = 0;
	const other = setInterval(() => {
		if (readFileSync(host.conf('10-calico.conflist'), 'utf8').includes(PLUGIN_NAME)) {
			undone++;
			host.write('10-calico.conflist', CHAIN);
		}
	}, 5);
	t.teardown(() => {
		clearInterval(other);
	});
	await eventually('said', () => host.lines.some(line => line.includes('again and again')));
	t.false(host.installer.state.installed);
	t.regex(host.installer.state.problem!, /another program takes the CNI plugin out of .* again and again/);
	const before = undone;
	const heard = host.lines.length;
	await sleep(1500);
	t.true(undone <= before + 2, `${undone - before} times in 1.5 s`);
	t.true(host.lines.length <= heard + 4, host.lines.join('\n'));
	clearInterval(other);
	await eventually('put back at last', () => host.installer.state.installed);
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
});

const unusable = test.macro({
	exec(t, name: string, text: string, message: RegExp) {
		const host = new Host(t);
		host.write(name, text);
		host.write('99-later.conflist', CHAIN);
		const error = t.throws(() => {
			host.installer.install();
		}, {instanceOf: InputError, message});
		t.deepEqual(host.installer.state, {installed: false, problem: error!.message});
		t.true(error!.message.startsWith(host.conf(name)), 'names the file');
		t.is(readFileSync(host.conf(name), 'utf8'), text, 'left as it is');
		t.deepEqual(host.read('99-later.conflist'), CHAIN);
		t.deepEqual(host.names(), [name, '99-later.conflist']);
	},
	title: (title = '') => `left alone, with a reason: ${title}`,
});
const file = '10-x.conflist';
test('no JSON', unusable, file, '{"plugins": [', /is not JSON \(.*\): left as it is/);
test('JSON with comments', unusable, file, `// calico\n${JSON.stringify(CHAIN)}`, /is not JSON/);
test('an empty file', unusable, file, '', /is not JSON/);
test('a list at the top', unusable, file, '[]', /expected an object/);
test('no plugins', unusable, file, '{"name":"x","cniVersion":"1.0.0"}', /expected `plugins`/);
test('an empty list of plugins', unusable, file, '{"name":"x","cniVersion":"1.0.0","plugins":[]}', /expected `plugins`/);
test('a plugin without a type', unusable, file, '{"name":"x","cniVersion":"1.0.0","plugins":[{}]}', /a `type`/);
test('no name', unusable, file, '{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}', /expected a `name`/);
test('no version', unusable, file, '{"name":"x","plugins":[{"type":"a"}]}', /cniVersion is not said, which means 0\.1\.0/);
test('a version without chains', unusable, file, '{"name":"x","cniVersion":"0.2.0","plugins":[{"type":"a"}]}', /cniVersion is "0\.2\.0"/);
test('a number that JavaScript cannot write', unusable, file, '{"name":"x","cniVersion":"1.0.0","plugins":[{"type":"a","n":12345678901234567890}]}', /12345678901234567000 would not survive/);
test('a .conf that is a list', unusable, '10-x.conf', JSON.stringify(CHAIN), /belongs into a \.conflist/);

test('each version that the plugin takes', t => {
	for (const cniVersion of CNI_VERSIONS) {
		const host = new Host(t);
		host.write('10-x.conflist', {...CHAIN, cniVersion});
		host.installer.install();
		t.true(host.installer.state.installed);
	}
});

const CONF = {cniVersion: '0.3.1', name: 'flat', type: 'bridge', ipam: {type: 'host-local', subnet: '10.1.0.0/16'}};
const LIST = {cniVersion: '0.3.1', name: 'flat', plugins: [CONF, ENTRY]};

for (const extension of ['conf', 'json']) {
	const saved = `10-flat.${extension}.sidestep-saved`;

	test(`a .${extension} is set aside, and a list made of it; uninstall puts it back`, t => {
		const host = new Host(t);
		host.write(`10-flat.${extension}`, CONF);
		host.installer.install();
		t.deepEqual(host.names(), [saved, '10-flat.conflist'].sort());
		t.deepEqual(host.read('10-flat.conflist'), LIST);
		host.another().install();
		t.deepEqual(host.names(), [saved, '10-flat.conflist'].sort());
		// Its owner writes it anew.
		host.write(`10-flat.${extension}`, {...CONF, mtu: 9000});
		host.another().install();
		if (extension === 'conf') {
			t.deepEqual(host.read('10-flat.conflist'), {...LIST, plugins: [{...CONF, mtu: 9000}, ENTRY]});
			t.deepEqual(host.names(), [saved, '10-flat.conflist'].sort());
		}

		host.installer.uninstall();
		t.deepEqual(host.names(), [`10-flat.${extension}`]);
		t.deepEqual(host.read(`10-flat.${extension}`), {...CONF, mtu: 9000});
	});

	test(`a .${extension}, and the agent died after the first step`, t => {
		const host = new Host(t);
		host.write(`10-flat.${extension}`, CONF);
		host.write('10-flat.conflist', LIST);
		host.installer.install();
		t.deepEqual(host.read('10-flat.conflist'), LIST);
		host.installer.uninstall();
		t.deepEqual(host.read(`10-flat.${extension}`), CONF);
		t.notRegex(readFileSync(host.conf(host.names()[0]!), 'utf8'), /sidestep/);
	});
}

test('what an agent left that died while it wrote', t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	host.write('10-calico.conflist.sidestep-new', '{"half":');
	mkdirSync(host.bin());
	writeFileSync(host.bin(`${PLUGIN_NAME}.sidestep-new`), 'half', {mode: 0o400});
	host.installer.install();
	t.deepEqual(host.names(), ['10-calico.conflist']);
	t.deepEqual(readdirSync(host.bin()), [PLUGIN_NAME]);
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
	host.write('07-gone.conflist.sidestep-new', '{"half":');
	host.installer.uninstall();
	t.deepEqual(host.names(), ['10-calico.conflist']);
});

test('a link is followed: the file that it leads to is changed, and the link stays', t => {
	const host = new Host(t);
	mkdirSync(path.join(host.base, 'real'));
	const real = path.join(host.base, 'real', 'calico.json');
	writeFileSync(real, JSON.stringify(CHAIN));
	symlinkSync('../real/calico.json', host.conf('10-calico.conflist'));
	host.installer.install();
	t.true(lstatSync(host.conf('10-calico.conflist')).isSymbolicLink());
	t.deepEqual(JSON.parse(readFileSync(real, 'utf8')), CHAINED);
	t.deepEqual(readdirSync(path.dirname(real)), ['calico.json']);
	unlinkSync(real);
	t.throws(() => {
		host.installer.install();
	}, {instanceOf: HostError, message: /10-calico\.conflist cannot be read \(ENOENT.*if it is a symbolic link, mount/});
});

test('uninstall takes out what is ours, everywhere, and nothing else; twice is fine', t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	host.installer.install();
	host.write('05-first.conflist', {...CHAIN, name: 'first'});
	host.installer.install();
	host.write('20-foreign.conflist', 'sidestep-cni is not in here, nor is this JSON');
	host.write('30-other.conflist', '{ "plugins" : [ {"type":"x"} ] }');
	t.throws(() => {
		host.installer.uninstall();
	}, {instanceOf: InputError, message: /20-foreign.*is not JSON/});
	t.deepEqual(host.read('05-first.conflist'), {...CHAIN, name: 'first'}, 'the others are done all the same');
	t.deepEqual(host.read('10-calico.conflist'), CHAIN);
	t.true(existsSync(host.bin(PLUGIN_NAME)), 'kept, as a chain may name it still');
	unlinkSync(host.conf('20-foreign.conflist'));
	host.installer.uninstall({keepFile: true});
	t.true(existsSync(host.bin(PLUGIN_NAME)));
	host.installer.uninstall();
	t.false(existsSync(host.bin(PLUGIN_NAME)));
	t.is(readFileSync(host.conf('30-other.conflist'), 'utf8'), '{ "plugins" : [ {"type":"x"} ] }');
	t.false(host.installer.state.installed);
	host.installer.uninstall();
	rmSync(host.conf(), {recursive: true});
	rmSync(host.bin(), {recursive: true});
	host.installer.uninstall();
});

test('closing leaves everything in place, and nothing is put back any more', async t => {
	const host = new Host(t, {checkMs: 20});
	host.write('10-calico.conflist', CHAIN);
	host.installer.watch();
	host.installer.close();
	t.deepEqual(host.read('10-calico.conflist'), CHAINED);
	host.write('10-calico.conflist', CHAIN);
	await sleep(400);
	t.deepEqual(host.read('10-calico.conflist'), CHAIN);
});

test('directories that cannot be written: a reason, and what to look at', t => {
	const host = new Host(t);
	host.write('10-calico.conflist', CHAIN);
	writeFileSync(host.bin(), 'a file in the place of the directory');
	t.throws(() => {
		host.installer.install();
	}, {instanceOf: HostError, message: /the CNI plugin cannot be installed \(.*(?:EEXIST|ENOTDIR).*\): look at/});
	t.false(host.installer.state.installed);
	t.deepEqual(host.read('10-calico.conflist'), CHAIN, 'no entry without its file');
});
