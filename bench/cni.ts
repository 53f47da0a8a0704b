/**
`node dist/bench/cni.js`: what the CNI plugin adds to a pod's start: from starting it to its end, one run after another. ADD asks a server as the agent's,
which says yes at once. One of the Go plugins that are in every chain, where installed, for scale.
*/
import {execFile} from 'node:child_process';
import {existsSync, mkdtempSync, rmSync, statSync, writeFileSync} from 'node:fs';
import {arch, cpus, release, tmpdir} from 'node:os';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {promisify} from 'node:util';
import {toJson, toTable} from '../src/cli/format.js';
import {BUILT_PLUGIN} from '../src/cni/command.js';
import {CniServer} from '../src/cni/server.js';
import {ENVIRONMENT, netconf} from '../test/cni/plugin.js';
import {parseOptions} from './frame.js';

const SPAWN = fileURLToPath(new URL('../../build/test/spawn', import.meta.url));
const GO_PLUGIN = '/usr/lib/cni/portmap';

const {output, counts} = parseOptions('cni [-o table|json] [--runs N]', {runs: 1000});
const directory = mkdtempSync(path.join(tmpdir(), 'sst-cni-bench-'));
const done = async () => undefined;
const server = new CniServer({socketPath: path.join(directory, 'cni.sock'), log: console.error, handler: {add: done, check: done, del: done}});
try {
	await server.listen();
	const input = path.join(directory, 'netconf');
	writeFileSync(input, netconf(path.join(directory, 'cni.sock')));
	const measure = async (command: string, program: string) => {
		const {stdout} = await promisify(execFile)(SPAWN, [String(counts.runs), input, program], {env: {...ENVIRONMENT, CNI_COMMAND: command}});
		return {program: path.basename(program), command, bytes: statSync(program).size, ...JSON.parse(stdout) as Record<string, number>};
	};

	const rows = [await measure('VERSION', BUILT_PLUGIN), await measure('ADD', BUILT_PLUGIN), await measure('DEL', BUILT_PLUGIN), ...existsSync(GO_PLUGIN) ? [await measure('VERSION', GO_PLUGIN)] : []];
	if (server.counters.add.ok !== counts.runs) {
		throw new Error(`the server answered ${server.counters.add.ok} of ${counts.runs} calls`);
	}

	const machine = {kernel: `${release()} ${arch()}`, cpu: `${cpus()[0]!.model}, ${cpus().length} CPUs`};
	process.stdout.write(output === 'json' ? toJson({...machine, rows}) : `${machine.kernel}; ${machine.cpu}\n\n${toTable(rows, '')}`);
} finally {
	await server.close();
	rmSync(directory, {recursive: true});
}
