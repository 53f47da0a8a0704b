import {Argument, Command, CommanderError, InvalidArgumentError, Option} from 'commander';
import {runAgent} from '../agent.js';
import {AgentError, reasonOf} from '../errors.js';
import {Datapath, PROGRAMS, openDatapath, unload} from '../loader/datapath.js';
import {DEFAULT_BPFFS, isBpffs, requireCapabilities} from '../loader/host.js';
import {isAgentRunning, takeWriterLock} from '../loader/lock.js';
import {openObject, packageVersion} from '../loader/object.js';
import {PinLayout} from '../loader/paths.js';
import {checkHost} from '../loader/probes.js';
import {MAP_NAMES, type MapName} from '../maps/schema.js';
import {parseListenAddress} from '../metrics/server.js';
import type {Environment} from './environment.js';
import {outputOption, toJson, toTable, type OutputFormat, type Row} from './format.js';
import {describePods, dumpMap, listMaps, statusRows} from './read.js';

const EXIT_FAILED = 1;
const EXIT_MISUSE = 2;

interface ReadOptions {
	readonly bpffs: string;
	readonly output: OutputFormat;
}

/**
Runs one command.

@returns the exit code: 0 done, 1 failed, 2 misuse.
*/
export async function main(argv: readonly string[], environment: Environment): Promise<number> {
	let code = 0;
	const program = createProgram(environment, failed => {
		code = failed;
	});
	try {
		await program.parseAsync(argv, {from: 'user'});
		return code;
	} catch (error) {
		if (error instanceof CommanderError) {
			return error.exitCode === 0 ? 0 : EXIT_MISUSE;
		}

		environment.stderr(`sidestep: ${error instanceof AgentError ? error.message : reasonOf(error)}\n`);
		return error instanceof AgentError && error.code === 'ERR_INPUT' ? EXIT_MISUSE : EXIT_FAILED;
	}
}

function createProgram({stdout, stderr, signal}: Environment, setCode: (code: number) => void): Command {
	const bpffs = () => new Option('--bpffs <directory>', 'bpf file system that holds the pins').env('SIDESTEP_BPFFS').default(DEFAULT_BPFFS);
	const cgroup = () => new Option('--cgroup <directory>', 'cgroup v2 directory to attach to (default: its root)').env('SIDESTEP_CGROUP');
	const show = (format: OutputFormat, rows: readonly Row[], emptyText: string) => {
		stdout(format === 'json' ? toJson(rows) : toTable(rows, emptyText));
	};

	const read = async (options: ReadOptions, act: (datapath: Datapath) => void) => {
		const datapath = openDatapath(options.bpffs);
		try {
			act(datapath);
		} finally {
			datapath.close();
		}
	};

	const program = new Command('sidestep')
		.description('Sends pods\' connections to a local proxy with eBPF instead of iptables')
		.version(packageVersion())
		.exitOverride()
		.configureOutput({writeOut: stdout, writeErr: stderr})
		.showHelpAfterError('(see --help)');
	program.helpCommand(true);

	program.command('run')
		.description('run the agent: load, attach, and keep the kernel equal to the pods file')
		.requiredOption('--pods-file <file>', 'which pods to enrol (YAML); watched for changes')
		.addOption(bpffs())
		.addOption(cgroup())
		.addOption(new Option('--proc <directory>', 'the host\'s /proc').env('SIDESTEP_PROC').default('/proc'))
		.addOption(new Option('--metrics-address <address:port>', 'where /metrics, /healthz and /readyz are served').env('SIDESTEP_METRICS_ADDRESS').default('127.0.0.1:9478'))
		.option('--resync <ms>', 'compare with the kernel this often, although nothing changed', integer(100, 3_600_000), 10_000)
		.option('--max-pods <number>', 'capacity of the maps, when they are made', integer(1, 1_000_000), 1024)
		.addHelpText('after', '\nExample:\n  sidestep run --pods-file /etc/sidestep/pods.yaml\n\nSIGTERM and SIGINT stop the agent and leave capture in place.')
		.action(async (options: {podsFile: string; bpffs: string; cgroup?: string; proc: string; metricsAddress: string; resync: number; maxPods: number}) => {
			await runAgent({
				podsFile: options.podsFile,
				bpffs: options.bpffs,
				cgroup: options.cgroup,
				proc: options.proc,
				metrics: parseListenAddress(options.metricsAddress, '--metrics-address'),
				resyncMs: options.resync,
				maxPods: options.maxPods,
				log(line) {
					stderr(`${new Date().toISOString()} ${line}\n`);
				},
				signal,
			});
		});

	program.command('check')
		.description('try what this kernel can do: what works, what degrades, what is missing')
		.addOption(bpffs())
		.addOption(cgroup())
		.addOption(outputOption())
		.addHelpText('after', '\nExit code 1 if anything that capture needs is missing.')
		.action((options: ReadOptions & {cgroup?: string}) => {
			const findings = checkHost(options);
			show(options.output, findings.map(finding => ({...finding})), 'nothing was checked');
			if (findings.some(({state}) => state === 'missing')) {
				setCode(EXIT_FAILED);
			}
		});

	program.command('status')
		.description('what is loaded and attached, and whether an agent runs')
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (options: ReadOptions) => read(options, datapath => {
			const status = statusRows(datapath, isAgentRunning(datapath.layout));
			if (options.output === 'json') {
				stdout(toJson(status));
				return;
			}

			const {programs, ...facts} = status;
			stdout(Object.entries(facts).map(([name, value]) => `${name}: ${String(value)}\n`).join(''));
			stdout(`\n${toTable(programs, 'no programs')}`);
		}));

	program.command('pods')
		.description('enrolled pods, and what became of their connections')
		.argument('[name]', 'one pod, with every reason')
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (name: string | undefined, options: ReadOptions) => read(options, datapath => {
			const pods = describePods(datapath).filter(pod => name === undefined || pod.name === name);
			if (name !== undefined && pods.length === 0) {
				stderr(`sidestep: no pod ${name} is enrolled: see \`sidestep pods\`\n`);
				setCode(EXIT_FAILED);
				return;
			}

			if (options.output === 'json') {
				stdout(toJson(pods));
			} else if (name === undefined) {
				show('table', pods.map(({reasons: _, exempt: __, enrolledAt: ___, ...row}) => row), 'no pod is enrolled');
			} else {
				const {reasons, ...facts} = pods[0]!;
				stdout(Object.entries(facts).map(([key, value]) => `${key}: ${typeof value === 'object' ? JSON.stringify(value) : String(value)}\n`).join(''));
				stdout(`\n${toTable(Object.entries(reasons).map(([reason, connections]) => ({reason, connections})), 'no counters')}`);
			}
		}));

	const map = program.command('map').description('the kernel\'s maps');
	map.command('list')
		.description('all maps with their fill')
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (options: ReadOptions) => read(options, datapath => {
			show(options.output, listMaps(datapath), 'no maps');
		}));
	map.command('dump')
		.description('all entries of one map')
		.addArgument(new Argument('<name>', 'the map').choices(MAP_NAMES.filter(name => name !== 'original_dsts')))
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (name: MapName, options: ReadOptions) => read(options, datapath => {
			show(options.output, dumpMap(datapath, name), 'the map is empty');
		}));

	program.command('unload')
		.description('take programs, maps and pins away: pods connect directly from then on')
		.addOption(bpffs())
		.action((options: {bpffs: string}) => {
			requireCapabilities();
			if (!isBpffs(options.bpffs)) {
				stdout('nothing is loaded\n');
				return;
			}

			const opened = openObject();
			opened.object.close();
			const lock = takeWriterLock(new PinLayout(options.bpffs, opened.schema.layoutVersion));
			try {
				stdout(unload(lock) ? `unloaded: ${PROGRAMS.length} programs are detached, all pins are gone\n` : 'nothing is loaded\n');
			} finally {
				lock.release();
			}
		});

	return program;
}

function integer(low: number, high: number): (text: string) => number {
	return text => {
		const value = Number(text);
		if (!/^\d+$/.test(text) || value < low || value > high) {
			throw new InvalidArgumentError(`Expected an integer from ${low} to ${high}.`);
		}

		return value;
	};
}
