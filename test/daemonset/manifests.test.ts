import {readFileSync, writeFileSync, mkdtempSync, rmSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import test from 'ava';
import {main} from '../../src/cli/program.js';
import {packageVersion} from '../../src/loader/object.js';
import {run} from '../helpers/process.js';
import {expressions, ruleGroups, rules} from './expressions.js';
import {OVERLAYS, ROOT, TOOLS, object, objects, podTemplate, render, type KubernetesObject} from './rendered.js';

/** From the first that knows `appArmorProfile` to the newest. */
const KUBERNETES = ['1.30', '1.33', '1.37'];

function file(t: {teardown(clean: () => void): void}, text: string): string {
	const directory = mkdtempSync(path.join(tmpdir(), 'sidestep-manifests-'));
	t.teardown(() => {
		rmSync(directory, {recursive: true});
	});
	const name = path.join(directory, 'file.yaml');
	writeFileSync(name, text);
	return name;
}

for (const overlay of OVERLAYS) {
	test(`overlay ${overlay}: kustomize renders it, and it fits Kubernetes' own schemas without one unknown field`, t => {
		const text = render(`overlays/${overlay}`);
		t.deepEqual(objects(`overlays/${overlay}`).map(({kind}) => kind).sort(), ['ClusterRole', 'ClusterRoleBinding', 'DaemonSet', 'Namespace', 'ServiceAccount']);
		for (const version of KUBERNETES) {
			const {code, stdout, stderr} = run(path.join(TOOLS, 'kubernetes-validate'), ['--strict', '-k', version, file(t, text)]);
			t.is(code, 0, `${stdout}${stderr}`);
			t.is(`${stdout}${stderr}`.match(/passed/g)?.length, 5, `${stdout}${stderr}`);
		}
	});

	test(`overlay ${overlay}: every command, option and variable exists, and every mount has its volume`, async t => {
		const {initContainers = [], containers: [agent], volumes} = podTemplate(overlay);
		const {env, volumeMounts, image} = agent;
		const say = async (argv: readonly string[]) => {
			let said = '';
			const take = (text: string) => {
				said += text;
			};
			await main(argv, {stdout: take, stderr: take, signal: new AbortController().signal});
			return said;
		};

		for (const {args} of [...initContainers, ...overlay === 'remove' ? [] : [agent]]) {
			// It complains of the first that it does not know.
			t.regex(await say([...args, '--no-such-option']), /unknown option '--no-such-option'/);
		}

		const help = await say(['run', '--help']);
		const known = [...help.matchAll(/env:\s+(\w+)/g)].map(([, name]) => name);
		t.true(known.length > 10, help);
		for (const {name} of env) {
			t.true(known.includes(name), `${name} is no variable of \`sidestep run\``);
		}

		t.deepEqual(volumeMounts.map(({name}) => name).sort(), volumes.map(({name}) => name).sort());
		t.is(new Set(env.map(({name}) => name)).size, env.length);
		t.is(image, `sidestep:${packageVersion()}`);
	});
}

test('the steps of the removal may do what the agent may, and nothing else', t => {
	const {initContainers = [], volumes} = podTemplate('remove');
	const {containers: [agent], volumes: agentVolumes} = podTemplate('sidecar');
	t.deepEqual(initContainers.map(({args}) => args.join(' ')), ['cni uninstall', 'unload']);
	for (const {securityContext, volumeMounts, image} of initContainers) {
		t.deepEqual({securityContext, volumeMounts, image}, {securityContext: agent.securityContext, volumeMounts: agent.volumeMounts, image: agent.image});
	}

	t.deepEqual(volumes, agentVolumes);
});

test('names, labels and namespaces belong together', t => {
	const all = objects('overlays/ambient');
	const account = object(all, 'ServiceAccount');
	const binding = object<KubernetesObject & {readonly roleRef: object; readonly subjects: readonly object[]}>(all, 'ClusterRoleBinding');
	t.like(binding.roleRef, {kind: 'ClusterRole', name: object(all, 'ClusterRole').metadata.name});
	t.like(binding.subjects[0], {kind: 'ServiceAccount', name: account.metadata.name, namespace: object(all, 'Namespace').metadata.name});
	const {spec} = object<{spec: {selector: {matchLabels: object}; template: {metadata: {labels: object}; spec: {serviceAccountName: string; containers: [{ports: Array<{name: string}>}]}}}}>(all, 'DaemonSet');
	t.like(spec.template.metadata.labels, spec.selector.matchLabels);
	t.is(spec.template.spec.serviceAccountName, account.metadata.name);
	const monitor = object<{spec: {selector: {matchLabels: object}; podMetricsEndpoints: Array<{port: string}>}}>(objects('monitoring'), 'PodMonitor');
	t.like(spec.template.metadata.labels, monitor.spec.selector.matchLabels);
	t.is(monitor.spec.podMetricsEndpoints[0]!.port, spec.template.spec.containers[0].ports[0]!.name);
});

test('every alert rule and every panel is PromQL', t => {
	const recorded = expressions().map(({text}, index) => ({record: `r:${index}`, expr: text}));
	const {stdout} = run('promtool', ['check', 'rules', file(t, JSON.stringify({groups: [...ruleGroups().groups, {name: 'dashboard', rules: recorded}]}))]);
	t.regex(stdout, new RegExp(`SUCCESS: ${rules().length + recorded.length} rules found`), stdout);
	for (const {alert, annotations} of rules()) {
		t.deepEqual(Object.keys(annotations).sort(), ['description', 'runbook', 'summary'], alert);
	}
});

test('alerts fire when they should, and not otherwise', t => {
	const series = (name: string, labels: Readonly<Record<string, string>>, values: string) => ({
		series: `${name}{${Object.entries({node: 'a', ...labels}).map(([key, value]) => `${key}="${value}"`).join(',')}}`, values,
	});
	const always = (value: number) => `${value}x60`;
	/** @returns alerts after half an hour. */
	const firing = (input: readonly object[], alert: string, count: number) => {
		const rulesFile = file(t, JSON.stringify(ruleGroups()));
		const tests = {
			rule_files: [rulesFile], evaluation_interval: '1m',
			// What does not fire equals an empty list.
			tests: [{interval: '1m', input_series: input, promql_expr_test: [{expr: `count(ALERTS{alertname="${alert}",alertstate="firing"}) or vector(0)`, eval_time: '30m', exp_samples: [{value: count}]}]}],
		};
		return run('promtool', ['test', 'rules', file(t, JSON.stringify(tests))]);
	};

	const written = series('sidestep_status_writes_total', {result: 'written'}, always(3));
	const cases: ReadonlyArray<readonly [alert: string, fires: readonly object[], quiet: readonly object[]]> = [
		['SidestepAgentDown', [series('up', {job: 'sidestep/sidestep'}, always(0))], [series('up', {job: 'sidestep/sidestep'}, always(1)), series('up', {job: 'other'}, always(0))]],
		['SidestepNoZtunnel', [series('sidestep_ztunnels', {}, always(0)), written], [series('sidestep_ztunnels', {}, always(1)), written]],
		['SidestepNoZtunnel', [series('sidestep_ztunnels', {}, always(0)), written], [series('sidestep_ztunnels', {}, always(0)), series('sidestep_status_writes_total', {result: 'written'}, always(0))]],
		['SidestepProxyDoesNotAnswer',
			[series('sidestep_connect_failures_total', {pod: 'shop/web'}, '0+1x60'), series('sidestep_redirects_total', {pod: 'shop/web', to: 'outbound'}, '0+10x60')],
			[series('sidestep_connect_failures_total', {pod: 'shop/web'}, '0+1x60'), series('sidestep_redirects_total', {pod: 'shop/web', to: 'outbound'}, '0+100x60')]],
		['SidestepProxyDoesNotAnswer', [series('sidestep_inbound_refusals_total', {pod: 'shop/web'}, '0+1x60')], [series('sidestep_inbound_refusals_total', {pod: 'shop/web'}, always(7))]],
		['SidestepMapAlmostFull',
			[series('sidestep_map_entries', {map: 'pods'}, always(900)), series('sidestep_map_capacity', {map: 'pods'}, always(1024))],
			[series('sidestep_map_entries', {map: 'pods'}, always(250)), series('sidestep_map_capacity', {map: 'pods'}, always(1024))]],
		['SidestepCniCallsFail', [series('sidestep_cni_calls_total', {command: 'add', result: 'failed'}, '0+1x60')], [series('sidestep_cni_calls_total', {command: 'add', result: 'ok'}, '0+1x60')]],
	];
	for (const [alert, fires, quiet] of cases) {
		for (const [input, count] of [[fires, 1], [quiet, 0]] as const) {
			const {code, stdout, stderr} = firing(input, alert, count);
			t.is(code, 0, `${alert} ${count}: ${stdout}${stderr}`);
		}
	}
});

test('every field of the guide\'s tables is in the manifests, and the other way round', t => {
	const guide = readFileSync(path.join(ROOT, 'daemonset/README.md'), 'utf8');
	const {containers: [{securityContext: {capabilities}}], volumes} = podTemplate('ambient');
	const table = (heading: string) => {
		const [, rows = ''] = new RegExp(`^### ${heading}\\n[^]*?\\n\\|[-|]+\\|\\n((?:\\|.*\\n)+)`, 'm').exec(guide) ?? [];
		return rows.trim().split('\n').map(row => /`([^`]+)`/.exec(row)?.[1]).sort();
	};

	t.deepEqual(table('Capabilities'), [...capabilities.add].sort());
	t.deepEqual(table('Host paths'), volumes.map(({hostPath}) => hostPath.path).sort());
	const {rules: granted} = object<{rules: ReadonlyArray<{apiGroups: string[]; resources: string[]; verbs: string[]}>}>(objects('overlays/ambient'), 'ClusterRole');
	t.deepEqual(table('API requests'), granted.flatMap(({resources, verbs}) => verbs.map(verb => `${verb} ${resources[0]}`)).sort());
});
